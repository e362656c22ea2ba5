"""Parity of `PatchTransformer` with the original PFTSleep encoder, and attention against a naive oracle."""
from pathlib import Path

import numpy as np
import pytest
import torch

from pftsleep.models.transformer import BatchNorm, PatchConfig, PatchTransformer, Reconstruction, attend, n_parameters

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "pftsleep"
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="../shared/fixtures is not here")


# ---- the original's tiny checkpoint ----

def from_original(state: dict, n_channels: int, n_layers: int) -> tuple[dict, dict]:
    "The original's keys as ours: encoder, reconstruction head."
    s = {k.removeprefix("model."): v for k, v in state.items()}
    stack = lambda prefix, what: torch.stack([s[f"{prefix}.W_P.{c}.{what}"] for c in range(n_channels)])
    ours = {"instance_norm.weight": s["revin.affine_weight"][0], "instance_norm.bias": s["revin.affine_bias"][0], "positions": s["pe.W_pos"],
        **{f"embedding.{what}": stack("patch_encoder", what) for what in ("weight", "bias")}}
    for i in range(n_layers):
        old, new = f"layers.{i}.", f"blocks.{i}."
        ours[new + "attention.scale"] = s[old + "self_attn.sdp_attn.scale"]
        for what in ("weight", "bias"):
            ours[new + "attention.qkv." + what] = torch.cat([s[f"{old}self_attn.W_{x}.{what}"] for x in "QKV"])
            for a, b in [("self_attn.to_out.0.", "attention.out."), ("ff.0.", "feed_forward.0."), ("ff.3.", "feed_forward.3.")]: ours[new + b + what] = s[old + a + what]
        for a, b in [("norm_attn.1.", "norm1."), ("norm_ffn.1.", "norm2.")]: ours |= {k.replace(old + a, new + b): v for k, v in s.items() if k.startswith(old + a)}
    return ours, {f"decoder.{what}": stack("head", what) for what in ("weight", "bias")}


def tiny_original(**changes) -> tuple[PatchTransformer, Reconstruction]:
    state = torch.load(FIXTURES / "pft_encoder_tiny.ckpt", weights_only=True)["state_dict"]
    config = PatchConfig.pftsleep(d_model=32, n_layers=2, n_heads=2, d_ff=64, max_patches=40, **changes)
    encoder, decoder = PatchTransformer(config), Reconstruction(config)
    for module, weights in zip((encoder, decoder), from_original(state, 7, 2), strict=True): module.load_state_dict(weights)
    return encoder.eval(), decoder.eval()


def same(ours: torch.Tensor, original: np.ndarray, tolerance: float) -> None:
    ours = ours.detach().numpy()
    assert ours.shape == original.shape
    assert np.abs(ours - original).max() < tolerance


@needs_fixtures
@pytest.mark.parametrize("masked", [False, True])
def test_original_encoder(masked):
    z = np.load(FIXTURES / "pft_encoder_tiny.npz")
    encoder, decoder = tiny_original()
    x, pad = torch.from_numpy(z["x"]), torch.from_numpy(z["mask"]) if masked else None
    with torch.no_grad():
        patches, hidden = encoder.patches(x, pad)
        values = encoder(x, pad)
        recon = decoder.reconstruct(values)
    assert masked == (hidden is not None)
    if masked: assert all((hidden[:, c].numpy() == z["key_padding_mask"]).all() for c in range(7)) and z["key_padding_mask"].any()
    same(patches.transpose(1, 2)[..., ::10], z["target"], 1e-5)
    same(encoder.instance_norm(x)[..., ::20], z["revin"], 1e-5)
    same(values.mT, z["z_mask" if masked else "z_nomask"], 1e-5)
    same(recon.transpose(1, 2)[..., ::10], z["recon_mask" if masked else "recon_nomask"], 1e-5)
    assert np.abs(z["z_mask"] - z["z_nomask"]).max() > 1e-3 # the mask matters in this fixture
