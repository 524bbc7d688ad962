"""How long does one decision take: one observation in, ten actions out?

    python benchmarks/latency.py

The guide-size model at batch 1 on the best backend of this machine, from a simulator's 128-pixel pictures. The stages
of the decision are timed in turn with the whole of it. On CUDA the whole is also timed as a CUDA graph, which is how
the evaluation decides, and with --compile through torch.compile. A decision holds ten actions at 20 Hz, so a robot that
performs them all needs two decisions a second.
"""

import numpy as np
import torch
from measure import REPO, arguments, compared, interleaved, print_table, ratio_text, write_results

from config import load_config
from jepa.mamba import choose_mamba_backend
from jepa.tokenizer import resize_images
from observation import CAMERAS
from statevla_model import RecordedDecision, StateVLA, build_trainer
from training.processes import choose_device

WHOLE = "decision"


def main() -> None:
    settings = arguments(
        __doc__,
        device={"default": "auto", "help": "auto, cuda, mps or cpu (default: %(default)s)"},
        compile={"action": "store_true", "help": "also torch.compile, which takes minutes (CUDA)"},
    )
    torch.manual_seed(0)
    config = load_config(REPO / "conf/config.yaml", ["model.encoder_depth=1"] if settings.quick else [])
    device = choose_device(settings.device)
    backend = choose_mamba_backend("auto", device)
    model = build_trainer(config, phase=2).model.to(device).eval()
    model.state_scaling.fit(torch.randn(64, config.model.state_dim))
    model.policy.normalizer.fit(torch.rand(64, 6) * 2 - 1)
    rounds = 3 if settings.quick else 60 if device.type == "cpu" else 200

    rng = np.random.default_rng(0)
    seen = {camera: rng.integers(0, 256, (128, 128, 3), dtype=np.uint8) for camera in CAMERAS}
    seen |= {"joint_states": np.zeros(7, np.float32), "gripper_states": np.zeros(2, np.float32)}
    language = torch.randn(config.model.lang_emb_dim).to(device)
    rows = []
    for precision in ("fp32", "bf16") if device.type == "cuda" else ("fp32",):
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        with torch.no_grad(), autocast:
            sides = stages(model, seen, language, device)
            times = interleaved(sides, rounds, warm_up=3)
            for stage, found in compared(times, WHOLE).items():
                rows.append({"stage": stage, "how": "eager", "precision": precision, "backend": backend, **found})
            if device.type == "cuda":
                ways = {"CUDA graph": recorded} | ({"torch.compile": compiled} if settings.compile else {})
                obs = prepared(seen, language, device)
                found = other_ways(ways, model, sides[WHOLE], obs, rounds)
                rows += [{"stage": WHOLE, "precision": precision, "backend": backend, **row} for row in found]
    timed = [row for row in rows if "seconds" in row]
    for row in timed:
        row["ms"], row["hz"] = row["seconds"]["median"] * 1e3, 1 / row["seconds"]["median"]

    print_table(
        "One decision: share of the eager whole, median (quartiles)",
        ["stage", "how", "precision", "share", "ms", "Hz"],
        [[row["stage"], row["how"], row["precision"], ratio_text(row["ratio"]), row["ms"], row["hz"]] for row in timed],
    )
    for row in rows:
        if "missing" in row:
            print(f"{row['how']}, {row['precision']}: {row['missing']}")
    notes = ["ratio: share of the eager decision within a round", "on a CPU ms and Hz are of this machine, no claim"]
    write_results("gpu_latency" if device.type == "cuda" else "latency", rows, notes, settings.quick)


def prepared(seen: dict, language: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
    """numpy observation of the simulator -> batch of one on the device, as run_libero_eval.py does it."""
    obs = {name: torch.from_numpy(np.ascontiguousarray(value))[None].to(device) for name, value in seen.items()}
    return obs | {"language": language[None]}


def stages(model: StateVLA, seen: dict, language: torch.Tensor, device: torch.device) -> dict:
    """The whole decision and its parts, each on what the part before it gives."""
    encoder, size = model.state_encoder, model.config.image_size
    obs = prepared(seen, language, device)
    resized = obs | {camera: resize_images(obs[camera], size).permute(0, 2, 3, 1) for camera in CAMERAS}
    tokens = encoder.tokenizer(resized)
    z_t = model.state_scaling(encoder.encoder(tokens))
    x_1 = torch.zeros(1, model.config.action_seq_len, 6, device=device)
    return {
        WHOLE: lambda: model.predict(prepared(seen, language, device), sample_steps=4, flow_start="zero").cpu(),
        "tensors": lambda: prepared(seen, language, device),
        "resize": lambda: [resize_images(obs[camera], size) for camera in CAMERAS],
        "tokenizer": lambda: encoder.tokenizer(resized),
        "encoder": lambda: encoder.encoder(tokens),
        "policy, 4 Euler steps": lambda: model.policy.sample(z_t, 4, x_1),
        "gripper": lambda: model.gripper.sample(z_t),
    }


def other_ways(ways: dict, model: StateVLA, eager, obs: dict, rounds: int) -> list[dict]:
    """The decision without Python between its kernels."""
    rows, x_1 = [], torch.zeros(1, model.config.action_seq_len, 6, device=obs["language"].device)
    expected = eager()
    for how, make in ways.items():
        try:
            decide = make(model, obs, x_1)
            difference = (decide() - expected).abs().max().item()
        except Exception as problem:  # whatever a backend's kernels can't do is a row, not the end of the benchmark
            rows.append({"how": how, "missing": f"{type(problem).__name__}: {problem}".splitlines()[0]})
            continue
        times = interleaved({WHOLE: eager, how: decide}, rounds, warm_up=3)
        rows.append({"how": how, **compared(times, WHOLE)[how], "largest_difference": difference})
    return rows


def recorded(model: StateVLA, obs: dict, x_1: torch.Tensor):
    """As run_libero_eval.py decides on CUDA: one graph, recorded once."""
    decision = RecordedDecision(model, obs, sample_steps=4)
    on_the_host = {name: value.cpu().pin_memory() for name, value in obs.items()}
    return lambda: decision(on_the_host, x_1).cpu()


def compiled(model: StateVLA, obs: dict, x_1: torch.Tensor):
    fast = torch.compile(lambda o, x: model.act(model.encode(o), x, 4), mode="reduce-overhead")
    return lambda: fast(obs, x_1).cpu()


if __name__ == "__main__":
    main()
