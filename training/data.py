"""The demonstrations of a run, and what of them a step of each phase is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config import Config
from dataloader import Batches, LowDimensional, chunk_rows, every_frame, transition_rows
from demos.frames import DeviceFrames, Frames, open_frames
from demos.hdf5 import Demo, between_pictures, drawn_rows, load_demos, split_demos
from demos.language import LanguageTable, load_languages
from demos.problems import first_raised
from demos.scenes import Scenes, load_scenes
from demos.simulator_truth import simulator_truth, target_on_pictures
from demos.states import by_row, encode_drawn, frozen_states
from errors import BadInput
from jepa.temporal_predictor import FORESIGHT
from statevla_model import StateVLATrainer
from training.processes import report

LEAST_SPREAD = 0.02  # m, to which the error of a place counts as 1: a standing basket's height trembles by far less


@dataclass(frozen=True)
class Data:
    """The demonstrations of a run, how they are split, what they were recorded with, and what of them is in memory."""

    demos: list[Demo]  # in the order of their rows
    train_demos: list[Demo]
    held_out_demos: list[Demo]
    observation: dict
    language: LanguageTable
    low_dimensional: LowDimensional
    scenes: Scenes | None = None  # without demonstrations

    @property
    def told_in_demos(self) -> list[str]:
        return sorted({demo.task for demo in self.demos})

    @property
    def instructions(self) -> list[str]:
        """All that training tells."""
        return sorted({*self.told_in_demos, *(self.scenes.instructions if self.scenes else ())})


def load_data(config: Config, phase: int, device: torch.device, held_out: Sequence[str]) -> Data:
    """`held_out` are the demos that the checkpoint which this run goes on from has held out."""
    min_actions = max(config.model.prediction_gap, config.model.action_seq_len)  # phase 2 is to read them, too
    demos, observation = load_demos(config.data, min_actions)
    train_demos, held_out_demos = split_demos(demos, config.data.train_split, config.data.split_seed, held_out)
    of_folders = {folder: [demo for demo in demos if demo.path.parent == folder] for folder in config.data.folders}
    language = load_languages(config.data, demos, config.model.lang_emb_dim)
    tasks = {demo.task for demo in demos}
    report(f"data: {len(tasks)} task(s), {len(train_demos)} demos train, {len(held_out_demos)} are held out")
    forced = "" if config.data.obs_alignment == "auto" else ", as data.obs_alignment says"
    for folder, found in of_folders.items():
        which = f"{folder}: {len(found)} demos, {found[0].image_size} px, " if len(of_folders) > 1 else ""
        steps = sorted({demo.draw_every for demo in found})
        drawn = "" if steps == [1] else f", a picture every {' or '.join(map(str, steps))} steps"
        report(f"data: {which}obs[t] was recorded {('before', 'after')[found[0].lag]} actions[t]{forced}{drawn}")
    if phase == 1:
        first_raised(between_pictures(demos, config.model.prediction_gap))
    low_dimensional = LowDimensional(demos, language, device)
    scenes = None
    if phase == 1 and config.data.scenes:
        scenes = load_scenes(Path(config.data.scenes), config.model.image_size, language)
        if config.training.phase1.place_of != "target" and not scenes.goals.isfinite().all():
            raise BadInput(
                f"data.scenes: some files of {config.data.scenes} do not say where the target is to be brought "
                "(attribute bddl_file_content, an obj_of_interest that can move), which training.phase1.place_of needs"
            )
        report(f"data: {len(scenes):,} scenes without demonstrations")
    return Data(demos, train_demos, held_out_demos, observation, language, low_dimensional, scenes)


def phase1_samples(trainer: StateVLATrainer, data: Data, config: Config) -> dict:
    """What Batches makes a sample of: a frame, the one K later, the actions between them, the robot's state ahead, and
    where the asked object is."""
    gap, device = config.model.prediction_gap, data.low_dimensional.device
    return {
        "labels": labels_of(trainer, data.demos),
        "num_actions": gap,
        "gap": gap,
        "ahead": FORESIGHT if trainer.foresight else (),
        "frames": open_frames(data.demos, config.data, config.model.image_size, device),
    }


def labels_of(trainer: StateVLATrainer, demos: Sequence[Demo]) -> dict[str, Tensor]:
    """What phase 1 is told of the simulator's states, by row: where the asked object appears on both pictures (N, 2, 2)
    and where it and what else place_of names are (N, 3), each only where a loss needs it."""
    advice = "training.phase1.{}_weight needs it; set it to 0 to do without labels"
    labels = {}
    if "gaze" in trainer.weights:
        labels["target_at"] = torch.cat([target_on_pictures(demo, advice.format("gaze")) for demo in demos])
    if "place" in trainer.weights:
        truths = [simulator_truth(demo, advice.format("place")) for demo in demos]
        for label in trainer.placed:
            places = []
            for demo, truth in zip(demos, truths, strict=True):
                if (place := truth.get(label.removesuffix("_place"))) is None:
                    raise BadInput(
                        f"{demo.path}: {demo.key}: its goal is no object, which training.phase1.place_of needs"
                    )
                places.append(place)
            labels[label] = torch.cat(places)
    return labels


def phase2_samples(trainer: StateVLATrainer, data: Data, config: Config) -> dict:
    """What Batches makes a sample of: a state z_t, or the frame to make it from, and the actions to come.

    A frozen encoder sees every frame once and epochs run on its states. Where the pictures or the encoder change from
    step to step, no state can be kept."""
    recipe, batch_size, device = config.training.phase2, config.training.batch_size, data.low_dimensional.device
    samples = {"num_actions": config.model.action_seq_len}

    def frames() -> Frames | DeviceFrames:
        return open_frames(data.demos, config.data, config.model.image_size, device)

    if not (recipe.store_states and recipe.freeze_encoder and not recipe.image_shift):
        return samples | {"frames": frames()}
    directory = Path(config.training.checkpoint_directory) / "frozen_states"
    states = frozen_states(
        trainer.model, data.demos, data.low_dimensional.language,
        lambda: every_frame(data.demos, data.low_dimensional, frames(), batch_size), directory,
    )  # fmt: skip
    return samples | {"states": states}


def both_batches(phase: int, data: Data, config: Config, samples: dict) -> tuple[Batches, Batches]:
    """Training and held-out batches, the latter of demonstrations alone. Raises BadInput where VICReg would take the
    variance of a single row, or there is nothing to validate."""
    batch_size, gap, chunk_length = config.training.batch_size, config.model.prediction_gap, config.model.action_seq_len
    train_rows, held_out_rows = (
        transition_rows(demos, gap) if phase == 1 else chunk_rows(demos, chunk_length)
        for demos in (data.train_demos, data.held_out_demos)
    )
    batches = Batches(
        train_rows,
        data.low_dimensional,
        batch_size=batch_size,
        seed=config.training.seed,
        scenes=data.scenes if phase == 1 else None,
        **samples,
    )
    held_out_batches = Batches(held_out_rows, data.low_dimensional, batch_size=batch_size, **samples)
    ranks = batches.order.ranks
    least = 2 if phase == 1 else 1
    step_size = batch_size * config.training.accumulate * ranks
    if step_size > len(train_rows):
        raise BadInput(
            f"training.accumulate is {config.training.accumulate}: a step takes {step_size} samples on {ranks} "
            f"process(es), but there are only {len(train_rows)} training samples; lower it, or --batch_size"
        )
    if phase == 1 and step_size < 2:
        raise BadInput(
            f"training.batch_size is {batch_size}: phase 1 takes the variance of z over the batch and needs at least 2 "
            "samples; use --batch_size 2 or more"
        )
    if len(held_out_rows) < least:
        raise BadInput(
            f"the held-out demos give {len(held_out_rows)} sample(s), phase {phase} needs at least {least}; lower "
            "data.train_split or use longer demos"
        )
    return batches, held_out_batches


def fit_statistics(trainer: StateVLATrainer, data: Data, config: Config, samples: dict) -> None:
    """Of the training demos: phase 1's of the robot state that foresight foretells, phase 2's of z and of actions."""
    if trainer.phase == 1:
        if trainer.foresight:
            rows = drawn_rows(data.train_demos).to(data.low_dimensional.device)
            trainer.robot_normalizer.fit(data.low_dimensional.robot_ahead(rows, frames=[0]).squeeze(1))
        if trainer.place:
            places = trainer.places_in(samples["labels"])[drawn_rows(data.train_demos)]
            trainer.place_normalizer.fit(places[places.isfinite().all(dim=1)], least_std=LEAST_SPREAD)
        return
    states = samples.get("states")
    if states is None:  # the encoder's at the start: it is trained on, or its pictures move
        batches = every_frame(data.demos, data.low_dimensional, samples["frames"], config.training.batch_size)
        states = by_row(encode_drawn(trainer.model, data.demos, batches), data.demos)
    trainer.model.state_scaling.fit(states[drawn_rows(data.train_demos)], config.training.phase2.state_scaling)
    trainer.model.policy.normalizer.fit(torch.cat([demo.actions[:, :6] for demo in data.train_demos]))
