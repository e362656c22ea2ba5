"""Settings of all tests."""
import os
import signal

from hypothesis import HealthCheck, settings

# A busy machine or an unlucky draw is no failure. CI draws the same examples each time, so that a red run there can be run again; everywhere else they are fresh.
settings.register_profile("house", deadline=None, derandomize=bool(os.environ.get("CI")), suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
settings.load_profile("house")

# A shell that runs these tests in the background has told its children to ignore Ctrl-C, and they would hand that down to the commands under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)
