"""What does z know? The report that `eval.py --checkpoint <phase 1>` prints, on the demos held out in training.

Collapse: effective rank and spread of z, in all, within a task and within an episode.
Probes: what a linear map and a small MLP read out of a frozen z, fitted on the training demos: where the target object,
its goal and the end effector are, and how far the gripper is open. The truth comes from the simulator states in the
HDF5 file. The same with the robot's own joints masked: they are an input, so that finding the end effector in z proves
little. The target before the grasp is apart, because afterwards it moves with the hand, and so is the way to it, by
which a policy aims: errors of hand and target may cancel there, or add up.
Prediction: the error of the predicted z, up to 20 frames ahead, as a share of the error of predicting no change.

A frame is a step of 0.05 s; of demos with pictures of every few alone, these frames are what z is known of.

Letters: N frames with pictures, D state_dim, K prediction gap.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from dataloader import LowDimensional, every_frame
from demos.frames import Frames
from demos.hdf5 import Demo, drawn_rows, numbered_alone
from demos.language import LanguageTable
from demos.simulator_truth import simulator_truth
from demos.states import encode_drawn
from errors import BadInput
from files import replaced_whole
from jepa.temporal_predictor import representation_health
from statevla_model import StateVLA

MOVED = 0.005  # metres after which the target no longer counts as standing where it stood
HORIZONS = (1, 2, 3, 5, 10, 15, 20)  # frames ahead
RIDGE = 1e-3  # of the linear probe, relative to z's variance
MLP_STEPS, MLP_BATCH, MLP_WIDTH = 500, 256, 128


# -------------------------------------------------------------------------------------------------------- the report


def representation_report(
    model: StateVLA,
    train_demos: Sequence[Demo],
    held_out_demos: Sequence[Demo],
    language: LanguageTable,
    frames: Frames,
    batch_size: int,
    device: torch.device,
) -> tuple[dict, dict]:
    """-> figures (JSON), and what `draw_report` needs. `frames` are those of all the demos, numbered as they are."""
    demos = [*train_demos, *held_out_demos]
    if [demo.first_row for demo in demos] != [demo.first_row for demo in numbered_alone(demos)]:
        raise ValueError("the demos must be numbered alone, training demos first")
    if not train_demos:
        raise BadInput("none of the demos was trained on; the report compares held-out frames with those of training")
    low_dimensional = LowDimensional(demos, language, device)
    z = encode_drawn(model, demos, every_frame(demos, low_dimensional, frames, batch_size))  # (N, D)
    split = sum(len(demo.drawn) for demo in train_demos)

    figures = {"frames": {"train": split, "held_out": len(z) - split}, "state_dim": z.shape[1]}
    figures |= {name: float(value) for name, value in representation_health(z[split:]).items()}
    figures |= spread_within(z[split:], held_out_demos)
    try:
        truths, without_probes = [truth_of_frames(demo) for demo in demos], None
    except BadInput as missing:  # files of other programs: everything but the probes works
        truths, without_probes = [], str(missing)
    probes = {}
    if truths:
        joints_hidden = _without_proprioception(low_dimensional)
        masked = encode_drawn(model, demos, every_frame(demos, joints_hidden, frames, batch_size))
        try:
            task = low_dimensional.task.cpu()[drawn_rows(demos)]
            probes = all_probes({"z": z, "proprioception masked": masked}, truths, task, split)
        except BadInput as too_few:
            without_probes = str(too_few)
    figures |= {"probes": probes, "without_probes": without_probes}
    figures["prediction"] = prediction_errors(model, z[split:], held_out_demos)
    spectrum = torch.linalg.svdvals((z[split:] - z[split:].mean(0)).double()).square()
    shares = (spectrum / spectrum.sum().clamp_min(1e-30)).tolist()
    return figures, {"z": z, "rows": drawn_rows(demos), "split": split, "spectrum": shares}


def truth_of_frames(demo: Demo) -> dict[str, Tensor]:
    """What `simulator_truth` says of those with pictures."""
    return {name: values[:: demo.draw_every] for name, values in simulator_truth(demo).items()}


def all_probes(inputs: dict[str, Tensor], truths: Sequence[dict], task: Tensor, split: int) -> dict[str, dict]:
    """Name of an input (N, D) -> quantity -> its probe. `truths` are those of each demo; a quantity that one of them
    lacks is left out."""
    known = [name for name in truths[0] if all(name in one for one in truths)]
    truth = {name: torch.cat([one[name] for one in truths]) for name in known}
    before_grasp = torch.cat([(one["target"] - one["target"][0]).norm(dim=1) < MOVED for one in truths])
    results = {}
    for name, z in inputs.items():
        results[name] = {quantity: probe(z, values, task, split) for quantity, values in truth.items()}
        places = {"target": truth["target"], "way to the target": truth["target"] - truth["end_effector"]}
        for quantity, values in places.items():
            results[name][f"{quantity} before the grasp"] = probe(z, values[:, :2], task, split, before_grasp)
    return results


def _without_proprioception(low_dimensional: LowDimensional) -> LowDimensional:
    """The same frames with every robot state replaced by the mean one."""
    masked = object.__new__(LowDimensional)
    masked.__dict__.update(low_dimensional.__dict__)
    masked.robot_state = {
        name: values.mean(0).expand_as(values) for name, values in low_dimensional.robot_state.items()
    }
    return masked


def spread_within(z: Tensor, demos: Sequence[Demo]) -> dict[str, float]:
    """Shares of z's variance (N, D) that lie within a task and within an episode. Near 0 within an episode means that
    z tells episodes apart and nothing that happens in them; 0 where z does not vary at all."""
    total = float(z.var(dim=0, correction=0).sum())
    lengths = [len(demo.drawn) for demo in demos]
    shares = {}
    for name, groups in (("task", [str(demo.path) for demo in demos]), ("episode", [demo.name for demo in demos])):
        labels = np.repeat(groups, lengths)
        within = sum(
            float((z[labels == group] - z[labels == group].mean(0)).square().sum()) for group in dict.fromkeys(groups)
        )
        shares[f"variance_within_{name}"] = within / len(z) / total if total else 0.0
    return shares


def probe(z: Tensor, truth: Tensor, task: Tensor, split: int, among: Tensor | None = None) -> dict:
    """How well `truth` (N, Q), in metres, can be read from z (N, D) of frames of tasks `task` (N,): one probe for all,
    fitted on the first `split` rows, tried on the rest; `among` (N,) restricts both to some rows.

    -> for linear and mlp: r2 of each coordinate (None where it does not vary), and mm, the mean distance to the truth;
    beside them mm_of_mean, that of always answering with the mean of the task's training rows. Telling the tasks apart
    earns nothing: r2 is relative to the variance within them. Raises BadInput for fewer than 2 rows to fit on or none
    to try on.
    """
    known = torch.isfinite(truth).all(dim=1)
    known = known if among is None else known & among
    train, test = known.clone(), known.clone()
    train[split:], test[:split] = False, False
    if train.sum() < 2 or not test.any():
        raise BadInput(
            f"the probes have {int(train.sum())} training frames and {int(test.sum())} held-out frames whose truth is "
            "known, expected at least 2 and 1"
        )
    scale = z[train].std(0).clamp_min(1e-6)
    x_train, x_test = ((z[rows] - z[train].mean(0)) / scale for rows in (train, test))
    centre = truth[train].mean(0)
    y_train, y_test = truth[train] - centre, truth[test] - centre
    answers = {"linear": _linear_probe(x_train, y_train, x_test), "mlp": _mlp_probe(x_train, y_train, x_test)}
    result = {name: _accuracy(answer, y_test, task[test]) for name, answer in answers.items()}
    means = torch.zeros_like(y_test)
    for one in task[test].unique():
        of_task = task[train] == one  # a task without training rows is answered with the mean of all
        means[task[test] == one] = y_train[of_task].mean(0) if of_task.any() else 0.0
    return result | {"mm_of_mean": 1000 * float((y_test - means).norm(dim=1).mean())}


def _linear_probe(x: Tensor, y: Tensor, x_test: Tensor) -> Tensor:
    x, y, x_test = x.double(), y.double(), x_test.double()
    gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    return (x_test @ torch.linalg.solve(gram, x.T @ y)).float()


def _mlp_probe(x: Tensor, y: Tensor, x_test: Tensor) -> Tensor:
    scale = y.std(0).clamp_min(1e-6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mlp = nn.Sequential(
            nn.Linear(x.shape[1], MLP_WIDTH), nn.GELU(), nn.Linear(MLP_WIDTH, MLP_WIDTH), nn.GELU(),
            nn.Linear(MLP_WIDTH, y.shape[1]),
        )  # fmt: skip
        optimizer = torch.optim.AdamW(mlp.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, MLP_STEPS)
        for _ in range(MLP_STEPS):
            rows = torch.randint(len(x), (MLP_BATCH,))
            nn.functional.mse_loss(mlp(x[rows]), y[rows] / scale).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with torch.no_grad():
        return mlp(x_test) * scale


def _accuracy(predicted: Tensor, truth: Tensor, task: Tensor) -> dict:
    centred = torch.cat([truth[task == one] - truth[task == one].mean(0) for one in task.unique()])
    errors, spreads = (predicted - truth).square().mean(0), centred.square().mean(0)
    r2 = [float(1 - error / spread) if spread > 1e-6 else None for error, spread in zip(errors, spreads, strict=True)]
    return {"r2": r2, "mm": 1000 * float((predicted - truth).norm(dim=1).mean())}


@torch.no_grad()
def prediction_errors(model: StateVLA, z: Tensor, demos: Sequence[Demo]) -> dict[str, float]:
    """Frames ahead -> mean squared error of the predicted z over that of predicting no change; multiples of K alone,
    since the predictor is applied to its own prediction. Demos without pictures K frames apart are left out."""
    gap, predictor = model.config.prediction_gap, model.state_encoder.predictor
    device = next(predictor.parameters()).device
    squared = {horizon: [0.0, 0.0] for horizon in HORIZONS if horizon % gap == 0}
    for demo, states in zip(demos, z.split([len(demo.drawn) for demo in demos]), strict=True):
        starts, every = len(demo) - demo.lag, demo.draw_every
        if gap % every:  # no frame so far ahead
            continue
        predicted = states.to(device)
        for step in range(1, max(squared, default=0) // gap + 1):
            first = (step - 1) * gap
            end = min(starts - first - gap + 1, len(demo) - step * gap)  # of the starts whose actions and target exist
            from_step = torch.arange(0, max(end, 0), every)
            if not (count := len(from_step)):
                break
            rows = from_step[:, None] + demo.lag + first + torch.arange(gap)
            predicted = predictor(predicted[:count], demo.actions[rows].to(device))
            if (horizon := step * gap) in squared:
                truth = states[horizon // every :][:count]
                squared[horizon][0] += float((predicted.cpu() - truth).square().sum())
                squared[horizon][1] += float((states[:count] - truth).square().sum())
    return {str(horizon): error / copy for horizon, (error, copy) in squared.items() if copy > 0}


# ------------------------------------------------------------------------------------------------ print and draw


def print_report(figures: dict) -> None:
    print(f"z on {figures['frames']['held_out']:,} frames of held-out demos, {figures['state_dim']} dimensions")
    print(
        f"effective rank {figures['effective_rank']:.1f}, mean std {figures['z_std']:.2f}; of z's variance "
        f"{figures['variance_within_task']:.0%} lie within a task and {figures['variance_within_episode']:.0%} within "
        "an episode"
    )
    if figures["without_probes"]:
        print(f"no probes: {figures['without_probes']}")
    else:
        print_probes(figures["probes"])
    errors = ", ".join(f"{horizon}: {error:.2f}" for horizon, error in figures["prediction"].items())
    print(f"\nprediction error as a share of copying z, by frames ahead: {errors or 'none that the gap leads to'}")


def print_probes(of_inputs: dict) -> None:
    heads = ("what a probe reads from z: mean error and R2", "linear", "MLP", "task's mean")
    print("\n{:<48}{:>27}{:>27}{:>14}".format(*heads))
    for inputs, probes in of_inputs.items():
        for quantity, result in probes.items():
            cells = []
            for kind in ("linear", "mlp"):
                r2 = " ".join("-" if value is None else f"{value:.2f}" for value in result[kind]["r2"])
                cells.append(f"{result[kind]['mm']:.1f} mm  {r2:>15}")
            label = quantity.replace("_", " ") + ("" if inputs == "z" else f", {inputs}")
            print(f"{label:<48}{cells[0]:>27}{cells[1]:>27}{result['mm_of_mean']:>11.1f} mm")


def draw_report(figures: dict, drawn: dict, frames: Frames, target: Path) -> None:
    """One PNG: the spectrum of z, the prediction error, and for some held-out frames the nearest training frames.

    Raises OSError where it cannot be written."""
    z, split = drawn["z"], drawn["split"]
    queries, neighbours, columns = 6, min(4, split), 5
    figure = plt.figure(figsize=(13, 3 + 1.7 * queries), layout="constrained")
    (above,), (below,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(3, 1.7 * queries))
    left, right = above.subplots(1, 2)
    left.semilogy(range(1, len(drawn["spectrum"]) + 1), np.maximum(drawn["spectrum"], 1e-12))
    left.set(title=f"variance of z by direction (effective rank {figures['effective_rank']:.0f})", xlabel="direction")
    left.set_ylim(bottom=1e-8)
    horizons = [int(horizon) for horizon in figures["prediction"]]
    right.plot(horizons, list(figures["prediction"].values()), marker="o")
    right.axhline(1, color="grey", linestyle="--", linewidth=1)
    right.text(0.98, 1.02, "copying z", ha="right", color="grey", transform=right.get_yaxis_transform())
    right.set(
        title="prediction error / error of copying z",
        xlabel="frames ahead",
        ylim=(0, 1.15 * max(1, *figures["prediction"].values(), 1)),
    )
    axes = below.subplots(queries, columns)
    chosen = np.linspace(split, len(z) - 1, queries + 2).astype(int)[1:-1]
    for row, query in zip(axes, chosen, strict=True):
        nearest = (z[:split] - z[query]).norm(dim=1).topk(neighbours, largest=False).indices.tolist()
        for axis, index in zip(row, [query, *nearest], strict=False):  # few training frames fill no row
            picture = np.empty((1, *frames.frame_shape), np.uint8)
            frames.read(drawn["rows"][[index]].numpy(), picture)
            axis.imshow(picture[0, 0, ::-1])  # upright for people
            axis.set(xticks=[], yticks=[])
    axes[0, 0].set_title("held-out frame")
    axes[0, 1].set_title("nearest training frames by z", loc="left")
    try:
        with replaced_whole(target) as part:
            figure.savefig(part, format="png", dpi=90)
    finally:
        plt.close(figure)
