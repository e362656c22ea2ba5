"Batches give everybody their own answer, whoever else is asking; the cache answers equal questions only."
import asyncio
import json
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pat import shaken

from pftsleep.apps.batching import Batcher, ResultCache, run_apart
from pftsleep.errors import ConfigError, RequestError
from pftsleep.models.pat import PAT, published_form
from pftsleep.models.transformer import PatchTransformer

torch.set_num_threads(1)


class Model:
    "Counts its calls; waits until it may go on."
    def __init__(self, answer=lambda key, items: [(key, i) for i in items], free=True):
        self.calls, self.begun, self.free, self.answer = [], threading.Semaphore(0), threading.Event(), answer
        if free: self.free.set()
    def __call__(self, key, items):
        self.calls.append((key, list(items)))
        self.begun.release()
        assert self.free.wait(30)
        return self.answer(key, items)


def running(check, model, **settings):
    "Run `check(batcher)` in a loop of its own, and stop the batcher."
    batcher = Batcher(model, **dict(max_wait=0.) | settings)
    try: return asyncio.run(asyncio.wait_for(check(batcher), 60))
    finally:
        model.free.set()
        assert batcher.close()


async def queued(batcher, key, item):
    "A caller that is in the queue, or being served."
    task = asyncio.create_task(batcher.submit(key, item))
    await asyncio.sleep(0)
    return task


async def held(batcher, model):
    "A caller whose batch has begun and doesn't end yet, so that what comes next has to wait."
    first = await queued(batcher, "first", "first")
    assert await asyncio.to_thread(model.begun.acquire, timeout=30)
    return first


# --- batches

def test_one_tensor_for_each_batch(): # defect 7: batches that were loops
    pat, shapes = shaken(PatchTransformer(published_form(PAT.S))), []
    pat.register_forward_pre_hook(lambda m, args: shapes.append(tuple(args[0].shape)))
    weeks = torch.randn(17, 10_080, generator=torch.Generator().manual_seed(0))
    def run(key, items):
        if isinstance(items[0], str): return items
        with torch.inference_mode(): return list(pat(torch.stack(items)[:, None]))
    model = Model(run, free=False)
    async def check(batcher):
        first = await held(batcher, model)
        tasks = [await queued(batcher, "pat", w) for w in weeks]
        model.free.set()
        await first
        return await asyncio.gather(*tasks)
    answers = running(check, model)
    assert shapes == [(8, 1, 10_080), (8, 1, 10_080), (1, 1, 10_080)]
    with torch.inference_mode(): alone = [pat(w[None, None])[0] for w in weeks]
    assert all(float((a - b).abs().max()) < 1e-5 for a, b in zip(answers, alone, strict=True)) # to float tolerance anywhere; equal on the machine of the notebook
    assert all(float((a - b).abs().max()) > .01 for a, b in zip(answers, alone[1:], strict=False)) # and not those of the neighbour


def test_keys_are_never_mixed_and_nobody_waits_for_ever():
    model = Model(free=False)
    async def check(batcher):
        first = await held(batcher, model)
        tasks = [await queued(batcher, k, n) for n, k in enumerate("aabacbbaac")]
        model.free.set()
        await first
        return await asyncio.gather(*tasks)
    assert running(check, model, max_batch=3) == list(zip("aabacbbaac", range(10), strict=True))
    assert model.calls[1:] == [("a", [0, 1, 3]), ("b", [2, 5, 6]), ("c", [4, 9]), ("a", [7, 8])] # the oldest first


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 99), st.booleans()), max_size=40), st.integers(1, 9))
def test_everybody_gets_their_own_answer(asked, size):
    "Whatever is asked in whatever order, and whichever items break their batches."
    def run(key, items):
        if any(bad for _, bad, _ in items): raise ValueError("a bad one")
        return [(key, n, place) for n, _, place in items]
    async def check(batcher): return await asyncio.gather(*(batcher.submit(k, (n, bad, place)) for place, (k, n, bad) in enumerate(asked)), return_exceptions=True)
    answers = running(check, Model(run), max_batch=size)
    for place, ((k, n, bad), got) in enumerate(zip(asked, answers, strict=True)): assert isinstance(got, ValueError) if bad else got == (k, n, place)


def test_a_failing_item_fails_alone():
    def run(key, items):
        if "bad" in items: raise RequestError("a bad one", "not_finite")
        return [i.upper() for i in items]
    model = Model(run, free=False)
    async def check(batcher):
        model.answer = lambda key, items: items
        first = await held(batcher, model)
        model.answer = run
        tasks = [await queued(batcher, "", i) for i in ("a", "bad", "c")]
        model.free.set()
        await first
        return await asyncio.gather(*tasks, return_exceptions=True), batcher.stats()
    (a, bad, c), stats = running(check, model)
    assert (a, c, bad.code) == ("A", "C", "not_finite") and stats["failed"] == 1 and stats["sizes"] == {1: 1, 3: 1}


def test_the_thread_survives_everything():
    def run(key, items): raise items[0]
    async def check(batcher):
        out = []
        for e in (ValueError("x"), MemoryError(), StopIteration(), SystemExit(1), KeyboardInterrupt(), RecursionError()): out += await asyncio.gather(batcher.submit("", e), return_exceptions=True)
        batcher.run = lambda key, items: [3, 4]
        out += await asyncio.gather(batcher.submit("", 0), return_exceptions=True)
        batcher.run = lambda key, items: items
        return [type(o).__name__ for o in out], await batcher.submit("", "fine")
    assert running(check, Model(run)) == (["ValueError", "MemoryError", "RuntimeError", "RuntimeError", "RuntimeError", "RecursionError", "RuntimeError"], "fine")
    assert run_apart(lambda key, items: [ValueError("mine") if i else i for i in items], "", [0])[0] == 0


def test_a_full_queue_refuses():
    model = Model(free=False)
    async def check(batcher):
        first = await held(batcher, model)
        waiting = [await queued(batcher, "", n) for n in range(3)]
        refused = await asyncio.gather(*(batcher.submit("", n) for n in range(5)), return_exceptions=True)
        model.free.set()
        return refused, await asyncio.gather(first, *waiting), await batcher.submit("", "later"), batcher.stats()
    refused, answers, later, stats = running(check, model, max_queue=3)
    assert {(e.status, e.code) for e in refused} == {(503, "busy")} and all(e.retry_after >= 1 for e in refused)
    assert answers == [("first", "first"), ("", 0), ("", 1), ("", 2)] and later == ("", "later") and (stats["refused"], stats["queue"]) == (5, 0)


def test_who_has_gone_is_not_computed_and_makes_room():
    model = Model(free=False)
    async def check(batcher):
        first = await held(batcher, model)
        tasks = [await queued(batcher, "", n) for n in range(3)]
        tasks[1].cancel()
        await asyncio.sleep(0); await asyncio.sleep(0)
        assert batcher.stats()["queue"] == 2
        tasks.append(await queued(batcher, "", "instead"))
        first.cancel() # while it is being computed: nobody is there when its answer comes
        model.free.set()
        return await asyncio.gather(first, *tasks, return_exceptions=True), batcher.stats()
    out, stats = running(check, model, max_queue=3)
    assert [type(o).__name__ for o in out] == ["CancelledError", "tuple", "CancelledError", "tuple", "tuple"]
    assert model.calls == [("first", ["first"]), ("", [0, 2, "instead"])] and stats["cancelled"] == 2


def test_a_batch_waits_for_others_but_not_for_long():
    async def check(batcher): return await asyncio.gather(*(batcher.submit("", n) for n in range(4)))
    model = Model()
    running(check, model, max_batch=4, max_wait=9.9) # full at once: nobody waits 10 s
    assert model.calls == [("", [0, 1, 2, 3])]
    running(check, model := Model(), max_batch=9, max_wait=.2)
    assert sum(len(items) for _, items in model.calls) == 4 and len(model.calls) <= 2


def test_stopping_answers_what_was_accepted():
    model = Model(free=False)
    async def check(batcher):
        first = await held(batcher, model)
        others = [await queued(batcher, "", n) for n in range(20)]
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        while not batcher._queue.closed: await asyncio.sleep(.001)
        with pytest.raises(RequestError) as e: await batcher.submit("", "too late")
        model.free.set()
        answers = await asyncio.gather(first, *others)
        return e.value.code, len(answers), await closing
    assert running(check, model) == ("stopping", 21, True)


def test_stopping_does_not_wait_for_ever():
    model = Model(free=False)
    async def check(batcher):
        first = await held(batcher, model)
        other = await queued(batcher, "", 1)
        closed = await asyncio.to_thread(batcher.close, .05)
        with pytest.raises(RequestError) as e: await other
        model.free.set()
        return closed, e.value.code, await first
    assert running(check, model) == (False, "stopping", ("first", "first"))


def test_several_loops_may_share_it():
    batcher, out = Batcher(lambda key, items: [i * 2 for i in items]), {}
    async def ask(n): return await asyncio.gather(*(batcher.submit("", k) for k in range(n, n + 20)))
    threads = [threading.Thread(target=lambda n=n: out.update({n: asyncio.run(ask(n))})) for n in (0, 100, 200)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert out == {n: [2 * k for k in range(n, n + 20)] for n in (0, 100, 200)} and batcher.close()


def test_a_caller_whose_loop_is_closed():
    model = Model(free=False)
    batcher, loop = Batcher(model, max_wait=0.), asyncio.new_event_loop()
    task = loop.create_task(batcher.submit("", 1))
    loop.run_until_complete(asyncio.sleep(0))
    assert model.begun.acquire(timeout=30)
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    model.free.set()
    assert asyncio.run(batcher.submit("", 2)) == ("", 2) and batcher.close()


@pytest.mark.parametrize("wrong", [dict(max_batch=0), dict(max_queue=0), dict(max_wait=-1.), dict(max_wait=float("nan"))])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ConfigError): Batcher(print, **wrong)


# --- the cache

WEEK = json.dumps(list(range(10_080))).encode()
ASKED = dict(body=WEEK, model_hash="m", scaler_hash="s", recipe_hash="r", options=dict(mode="embed", tokens=False, version=None), tenant="t")


@settings(max_examples=50)
@given(st.integers(0, len(WEEK) - 1), st.integers(1, 255))
def test_every_byte_of_the_week_counts(place, change): # defect 8: keys of the first and last values
    other = bytearray(WEEK)
    other[place] ^= change
    assert ResultCache.key(**ASKED) != ResultCache.key(**ASKED | dict(body=bytes(other)))


@pytest.mark.parametrize("change", [dict(model_hash="n"), dict(scaler_hash="n"), dict(scaler_hash=None), dict(scaler_hash="None"), dict(recipe_hash="n"), dict(tenant="u"), dict(options={}), dict(body=WEEK + b" "), dict(body=WEEK[:-1]),
    dict(options=dict(mode="explain", tokens=False, version=None)), dict(options=dict(mode="embed", tokens=True, version=None)), dict(options=dict(mode="embed", tokens=False, version="1")), dict(model_hash="ms", scaler_hash=""), dict(recipe_hash="rt", tenant="")])
def test_everything_else_counts_too(change): # defect 8: a forgotten option
    assert ResultCache.key(**ASKED) != ResultCache.key(**ASKED | change)


def test_the_order_of_options_does_not_count_and_the_key_is_the_same_in_every_process():
    assert ResultCache.key(**ASKED) == ResultCache.key(**ASKED | dict(options=dict(reversed(ASKED["options"].items()))))
    assert ResultCache.key(b"x", "m", None, "r", {}, "t") == "b03bd403e9bbce22f4eb4653a06d9b1f4f477d9f22fde54ecd6b7314a3994975"


class Plain:
    "What a cache should do, written down without cleverness."
    def __init__(self, most, ttl, size): self.most, self.ttl, self.size, self.kept = most, ttl, size, []
    def get(self, key, now):
        self.kept = [k for k in self.kept if k[0] != key or now < k[2] + self.ttl]
        found = next((k for k in self.kept if k[0] == key), None)
        if found: self.kept.remove(found); self.kept.append(found)
        return found and found[1]
    def put(self, key, value, now):
        self.kept = [k for k in self.kept if k[0] != key] + [(key, value, now)]
        if len(value) > self.size: self.kept.pop()
        while len(self.kept) > self.most or sum(len(k[1]) for k in self.kept) > self.size: self.kept.pop(0)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(["get", "put", "wait"]), st.sampled_from("abcd"), st.integers(0, 7)), max_size=60), st.integers(1, 4), st.integers(1, 12))
def test_the_cache_is_the_plain_one(steps, most, size):
    now = [0]
    cache, plain = ResultCache(most, ttl=5, max_bytes=size, clock=lambda: now[0]), Plain(most, 5, size)
    for what, key, n in steps:
        if what == "wait": now[0] += n
        elif what == "put": cache.put(key, bytes([n] * n)); plain.put(key, bytes([n] * n), now[0])
        else: assert cache.get(key) == plain.get(key, now[0])
        stats = cache.stats()
        assert stats["items"] == len(plain.kept) <= most and stats["bytes"] == sum(len(k[1]) for k in plain.kept) <= size


def test_counts_and_deletion():
    cache = ResultCache(10, 10)
    for n in range(5): cache.put(f"k{n}", b"x" * n, owner=("tenant", n % 2))
    cache.put("k0", b"again", owner=("tenant", 0)) # no duplicate
    assert (cache.get("k0"), cache.get("absent")) == (b"again", None)
    assert cache.forget(("tenant", 0)) == 3 and cache.get("k2") is None and cache.get("k1") == b"x"
    assert cache.stats() == dict(hits=2, misses=2, evicted=0, expired=0, replaced=1, forgotten=3, items=2, bytes=4)
    cache.clear()
    assert cache.stats()["items"] == cache.stats()["bytes"] == 0
    for value in ({}, "text", bytearray(3)):
        with pytest.raises(TypeError): cache.put("x", value)
    for wrong in (dict(max_items=0), dict(ttl=0), dict(ttl=float("nan")), dict(max_bytes=0)):
        with pytest.raises(ConfigError): ResultCache(**wrong)


def test_an_empty_answer_is_an_answer():
    cache = ResultCache(2, 10)
    cache.put("k", b"")
    assert cache.get("k") == b"" and cache.stats()["hits"] == 1


def test_many_threads():
    cache, wrong = ResultCache(20, 60, max_bytes=2000), []
    def use(seed):
        for n in np.random.default_rng(seed).integers(0, 60, 2000):
            if (found := cache.get(str(n))) not in (None, str(n).encode() * 10): wrong.append(found)
            cache.put(str(n), str(n).encode() * 10)
    threads = [threading.Thread(target=use, args=(k,)) for k in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    stats = cache.stats()
    assert not wrong and stats["items"] == 20 and stats["hits"] + stats["misses"] == 8000 and stats["bytes"] == sum(len(k.value) for k in cache._kept.values())
