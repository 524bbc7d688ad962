"""Other implementations of the Mamba mixer, each with our parameters: state dict in, strictly, same numbers out.

    mamba-ssm      its own module with its own `selective_scan_ref`: what it computes where its CUDA kernels can't run
    transformers   its MambaMixer's recurrence in Python, the "slow path" that it takes without kernels
    mambapy        its MambaBlock with the parallel scan

Only the mixer differs: every side runs in our residual blocks, with the same norms and the same MLP.
"""

import copy
import importlib
import importlib.util
import sys
import types

from torch import Tensor, nn

from jepa.mamba import MambaStack


def mamba_ssm(d_model: int) -> nn.Module:
    """The package can't be imported where there are no CUDA kernels and no triton: the modules it wants get empty
    stand-ins, and the scan is the package's own reference, which needs neither."""
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None:
        raise ImportError("mamba-ssm is not installed")
    if "mamba_ssm.modules.mamba_simple" not in sys.modules:
        for name in ("mamba_ssm", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.layer_norm", "selective_scan_cuda"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["mamba_ssm"].__path__ = list(spec.submodule_search_locations)
        sys.modules["mamba_ssm"].__spec__ = spec
        sys.modules["mamba_ssm.ops.triton"].__path__ = []
        sys.modules["mamba_ssm.ops.triton.layer_norm"]._layer_norm_fwd = None
        sys.modules.setdefault("causal_conv1d", None)  # an import of it fails, so the convolution is PyTorch's
        kernels = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        kernels.selective_scan_fn = kernels.selective_scan_ref
    return importlib.import_module("mamba_ssm.modules.mamba_simple").Mamba(d_model, use_fast_path=False)


def transformers(d_model: int) -> nn.Module:
    """Its modules look for mamba-ssm when they are imported, and would take our stand-in for the real one."""
    hidden = {name: sys.modules.get(name) for name in ("mamba_ssm", "causal_conv1d")}
    sys.modules |= dict.fromkeys(hidden)
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    for name, module in hidden.items():
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module
    return MambaMixer(MambaConfig(hidden_size=d_model, num_hidden_layers=1), layer_idx=0)


def mambapy(d_model: int) -> nn.Module:
    from mambapy.mamba import MambaBlock, MambaConfig

    return MambaBlock(MambaConfig(d_model=d_model, n_layers=1))


PEERS = {"mamba-ssm reference": mamba_ssm, "transformers": transformers, "mambapy": mambapy}


class TheirMixer(nn.Module):
    """A peer's mixer in the place of ours. None of them can leave outputs out, so `last` must be None."""

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.mixer = mixer

    def forward(self, tokens: Tensor, last: None = None) -> Tensor:
        assert last is None
        return self.mixer(tokens)


def with_mixer(stack: MambaStack, peer: str) -> MambaStack:
    """A copy of a stack, with its parameters, in which every mixer is the peer's. Raises ImportError without it."""
    twin = copy.deepcopy(stack)
    for layer in twin.layers:
        mixer = PEERS[peer](layer.norm.weight.numel())
        mixer.load_state_dict(layer.mixer.state_dict(), strict=True)
        layer.mixer = TheirMixer(mixer)
    return twin
