"""What does one training sample cost, in arithmetic, bytes read and bytes sent, and what follows for many GPUs?

    python benchmarks/flops.py

Counted, not estimated: matrix products by torch.utils.flop_counter on the real model (a multiplication and an addition
are two), the scan by its formula, bytes from the shapes. The second table is arithmetic on assumptions, which stand in
`Assumed`; docs/scaling.md discusses both.
"""

from dataclasses import dataclass

import torch
from measure import NO_FORESIGHT, REPO, arguments, print_table, write_results
from torch.utils.flop_counter import FlopCounterMode

from config import Config, load_config
from jepa import mamba
from statevla_model import StateVLATrainer, build_trainer

SCAN_FLOPS = 7  # per token, channel and state: delta A, exp, decay h, x B, +, C h, +


@dataclass(frozen=True)
class Assumed:
    """An H100 in a rented cluster. `achieved` is measured (gpu_throughput.json), all below is proportional to it."""

    peak: float = 989e12  # bf16 FLOP/s without sparsity, data sheet
    achieved: float = 0.03  # share of it in a training step of this batch, bf16; 0.05 at a batch of 256
    price: float = 3.0  # per GPU and hour
    gpus_per_node: int = 8
    inside: float = 400e9  # bytes/s between the GPUs of a node, NVLink, achieved
    between: float = 40e9  # bytes/s and GPU between nodes, one 400 Gbit/s adapter a GPU, achieved
    latency: float = 20e-6  # seconds that one hop of a ring costs, whatever it carries
    batch_size: int = 64  # per GPU


def observation(config: Config, batch: int, size: int) -> dict[str, torch.Tensor]:
    return {
        "agentview_rgb": torch.zeros(batch, size, size, 3, dtype=torch.uint8),
        "eye_in_hand_rgb": torch.zeros(batch, size, size, 3, dtype=torch.uint8),
        "joint_states": torch.zeros(batch, 7),
        "gripper_states": torch.zeros(batch, 2),
        "language": torch.zeros(batch, config.model.lang_emb_dim),
    }


def matrix_flops(work) -> int:
    """FLOPs of the matrix products and convolutions. Batched products occur in the plain scan alone: left out, so that
    the count is that of any backend."""
    with FlopCounterMode(display=False) as counter:
        work()
    return sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op))


def scan_flops(stack: mamba.MambaStack, tokens: int) -> int:
    return sum(SCAN_FLOPS * tokens * layer.mixer.A_log.numel() for layer in stack.layers)


def count(trainer: StateVLATrainer, config: Config, source_size: int) -> dict[str, float]:
    """Everything about one sample of phase 1, and one of phase 2 on stored states."""
    model, B = trainer.model, 2  # a batch of two, halved: one sample alone would hide what is paid per batch
    encoder = model.state_encoder
    obs = observation(config, B, source_size)
    actions = torch.zeros(B, config.model.prediction_gap, config.model.action_dim)
    tokens = encoder.tokenizer(obs)
    L = tokens.shape[1]
    z_t, x_1 = torch.zeros(B, config.model.state_dim), torch.zeros(B, config.model.action_seq_len, 6)

    def losses():
        return trainer({"obs": obs, "actions": actions, "next_obs": obs})["loss"]

    loss = losses()
    counts = {
        "target forward": matrix_flops(lambda: encoder.target(obs)) / B,
        "online forward": matrix_flops(lambda: encoder(obs)) / B,
        "step, without backward": matrix_flops(losses) / B,
        "backward": matrix_flops(lambda: loss.backward()) / B,
        "scan, one forward": scan_flops(encoder.encoder.mamba, L),
        "policy, one Euler step": matrix_flops(lambda: model.policy.sample(z_t, 1, x_1)) / B,
    }
    # the plain scan's backward computes the states again and runs the reverse recurrence: three forwards' worth
    scan = counts["scan, one forward"] * (1 + 1 + 3)
    counts["one phase-1 sample"] = counts["step, without backward"] + counts["backward"] + scan
    counts["tokens"] = L
    return counts


def cluster(flops: float, parameter_bytes: int, row_width: int, frame_bytes: int, gpus: int, assumed: Assumed) -> dict:
    """One phase-1 step on many GPUs: the arithmetic of docs/scaling.md.

    A ring all-reduce of n bytes over W GPUs sends 2 n (W - 1) / W per GPU in 2 (W - 1) hops; VICReg gathers W B rows
    and reduces their gradient. Nothing is overlapped here, so this is the pessimistic end.
    """
    B, W = assumed.batch_size, gpus
    compute = B * flops / (assumed.peak * assumed.achieved)
    nodes = -(-W // assumed.gpus_per_node)
    bandwidth = assumed.inside if nodes == 1 else assumed.between
    hops = 2 * (W - 1) if nodes == 1 else 2 * (assumed.gpus_per_node - 1) + 2 * (nodes - 1)  # a ring in a ring
    gradients = 2 * parameter_bytes * (W - 1) / W
    rows = 4 * row_width * B * (W - 1) * 3  # gathered once, their gradient reduced (twice the bytes)
    network = 0.0 if W == 1 else (gradients + rows) / bandwidth + 3 * hops * assumed.latency
    step = compute + network
    return {
        "gpus": W,
        "compute_ms": compute * 1e3,
        "network_ms": network * 1e3,
        "network_mb": (gradients + rows) / 1e6 if W > 1 else 0.0,
        "samples_per_s": W * B / step,
        "efficiency": compute / step,
        "read_gb_per_s": W * B / step * frame_bytes / 1e9,
        "cost_per_million": 1e6 / (W * B / step) / 3600 * W * assumed.price,
    }


def main() -> None:
    settings = arguments(
        __doc__,
        config={"default": str(REPO / "conf/config.yaml"), "help": "settings file (default: conf/config.yaml)"},
        source_size={"type": int, "default": 128, "help": "stored pixels a side (default: %(default)s, LIBERO's)"},
        achieved={"type": float, "default": Assumed.achieved, "help": "share of the peak (default: %(default)s)"},
        price={"type": float, "default": Assumed.price, "help": "per GPU-hour (default: %(default)s)"},
    )
    config = load_config(settings.config, [*(["model.encoder_depth=1"] if settings.quick else []), NO_FORESIGHT])
    mamba.choose_mamba_backend("torch", torch.device("cpu"))
    trainer = build_trainer(config, phase=1)
    counts = count(trainer, config, settings.source_size)
    trained = sum(p.numel() for p in trainer.parameters() if p.requires_grad)
    frame_bytes = 4 * 3 * settings.source_size**2  # two cameras at t and t + K
    row_width = 3 * config.model.state_dim + config.model.prediction_gap * config.model.action_dim

    rows = [{"what": name, "value": value} for name, value in counts.items()]
    rows += [
        {"what": "bytes read per sample", "value": frame_bytes},
        {"what": "parameters that phase 1 trains", "value": trained},
        {"what": "gradient bytes per step", "value": 4 * trained},
        {"what": "bytes per row that VICReg gathers", "value": 4 * row_width},
    ]
    print_table("One sample", ["what", ""], [[row["what"], f"{row['value']:,.0f}"] for row in rows])

    assumed = Assumed(achieved=settings.achieved, price=settings.price)
    figures = [
        cluster(counts["one phase-1 sample"], 4 * trained, row_width, frame_bytes, gpus, assumed)
        for gpus in (1, 8, 64, 1024)
    ]
    print_table(f"Phase 1 on many GPUs, assuming {assumed}", list(figures[0]), [list(row.values()) for row in figures])
    notes = ["the rows with gpus are arithmetic on the assumptions, not measurements", f"{assumed}"]
    write_results("flops", rows + figures, notes, settings.quick)


if __name__ == "__main__":
    main()
