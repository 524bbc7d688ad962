"""The model's parts against the guide's table, the paper's equations, and the laws they must obey."""

import math

import pytest
import torch
from helpers import fitted, phase1_batch, random_observation, small_config
from torch import nn

from action_policy import Normalizer, StateScaling
from config import ModelConfig, load_config
from jepa.temporal_predictor import (
    FORESIGHT,
    covariance_loss,
    representation_health,
    variance_loss,
)
from jepa.tokenizer import resize_images
from observation import ROBOT_STATES
from statevla_model import StateVLA, StateVLATrainer, build_trainer, count_parameters


@pytest.fixture(scope="module")
def guide_model() -> StateVLA:
    return StateVLA(ModelConfig(**load_config("conf/config.yaml").to_dict()["model"]))


# ---------------------------------------------------------------------------------------------- the guide's table


def test_parameter_counts_are_those_of_the_guides_table(guide_model):
    encoder = guide_model.state_encoder
    tokenizer = encoder.tokenizer
    assert count_parameters(tokenizer.agentview, tokenizer.eye_in_hand) == 494_080
    assert count_parameters(tokenizer.language) == 131_328
    assert count_parameters(tokenizer.robot_state) == 68_352
    assert count_parameters(encoder.encoder) == 12 * 1_028_096
    assert count_parameters(encoder.predictor) == pytest.approx(1.05e6, rel=0.01)
    assert 1.7e6 < count_parameters(guide_model.policy) < 1.9e6
    assert count_parameters(guide_model.gripper) == 134_154
    on_robot = count_parameters(tokenizer, encoder.encoder, guide_model.policy, guide_model.gripper)
    assert on_robot == pytest.approx(14.9e6, rel=0.01)


def test_a_frame_becomes_395_tokens_with_cls_last(guide_model):
    tokenizer = guide_model.state_encoder.tokenizer
    obs = random_observation(1, image_size=128)
    tokens = tokenizer(obs)
    assert tokens.shape == (1, 395, 256)
    assert torch.equal(tokens[0, 0], tokenizer.language(obs["language"])[0])
    assert torch.equal(tokens[0, 2:198], tokenizer.agentview(obs["agentview_rgb"])[0])
    assert torch.equal(tokens[0, 198:394], tokenizer.eye_in_hand(obs["eye_in_hand_rgb"])[0])
    assert torch.equal(tokens[0, -1], tokenizer.cls[0, 0])


# --------------------------------------------------------------------------------------------- observations and z


READ = {name: ["language", "agentview_rgb", "eye_in_hand_rgb", *parts] for name, parts in ROBOT_STATES.items()}


@pytest.mark.parametrize("robot_state, key", [(name, key) for name, keys in READ.items() for key in keys])
def test_every_part_of_the_observation_reaches_z(robot_state, key):
    model = build_trainer(small_config(f"data.robot_state={robot_state}"), 1).model.double()
    obs = random_observation(2) | {"ee_pos": torch.randn(2, 3), "ee_ori": torch.randn(2, 3)}
    other = dict(obs)
    other[key] = 255 - obs[key] if obs[key].dtype == torch.uint8 else obs[key] + 0.01
    assert not torch.equal(model.encode(obs), model.encode(other))
    unread = {name: value for name, value in obs.items() if name not in READ[robot_state]}
    assert unread and torch.equal(model.encode(obs), model.encode(obs | dict.fromkeys(unread)))


def test_images_are_resized_as_pillow_resizes_them():
    from PIL import Image

    image = torch.randint(0, 256, (1, 96, 96, 3), dtype=torch.uint8)
    smooth = nn.functional.avg_pool2d(image.permute(0, 3, 1, 2).float(), 5, 1, 2).to(torch.uint8).permute(0, 2, 3, 1)
    ours = resize_images(smooth, 64)[0].permute(1, 2, 0).numpy().astype(int)
    pillow = Image.fromarray(smooth[0].numpy()).resize((64, 64), Image.Resampling.BILINEAR)
    assert abs(ours - __import__("numpy").asarray(pillow).astype(int)).max() <= 2


def test_prediction_is_a_chunk_in_robot_units():
    model = fitted(build_trainer(small_config(), 2).model)
    actions = model.predict(random_observation(3))
    assert actions.shape == (3, 10, 7)
    assert actions[..., :6].abs().max() <= 1
    assert set(actions[..., 6].unique().tolist()) <= {-1.0, 1.0}


def test_a_model_without_fitted_statistics_does_not_pass_for_a_trained_one():
    assert build_trainer(small_config(), 2).model.predict(random_observation(2))[..., :6].isnan().all()


# ------------------------------------------------------------------------------------------------ phase 1's losses


def test_predictor_starts_as_the_copy_baseline():
    predictor = build_trainer(small_config(), 1).model.state_encoder.predictor
    z_t = torch.randn(4, 32)
    assert torch.equal(predictor(z_t, torch.randn(4, 2, 7)), z_t)


def test_variance_loss_is_zero_for_unit_std_and_one_for_collapse():
    z = torch.randn(20_000, 8)
    assert variance_loss(2 * z).item() == 0
    assert variance_loss(0.25 * z).item() == pytest.approx(0.75, abs=0.01)
    assert variance_loss(torch.ones(50, 8)).item() == pytest.approx(1 - math.sqrt(1e-4), abs=1e-5)


def test_covariance_loss_is_the_mean_squared_off_diagonal():
    z = torch.randn(64, 5, dtype=torch.float64)
    covariance = torch.cov(z.T)
    expected = sum(covariance[i, j] ** 2 for i in range(5) for j in range(5) if i != j) / 5
    assert covariance_loss(z).item() == pytest.approx(expected.item(), rel=1e-9)


def test_effective_rank_counts_the_dimensions_in_use():
    z = torch.zeros(4_000, 10)
    z[:, :3] = torch.randn(4_000, 3)
    assert representation_health(z)["effective_rank"].item() == pytest.approx(3, rel=0.01)
    assert representation_health(z)["z_std"].item() == pytest.approx(0.3, rel=0.05)


def test_target_is_an_exact_ema_of_tokenizer_and_encoder():
    trainer = build_trainer(small_config(), 1)
    encoder = trainer.model.state_encoder
    online = dict([*encoder.tokenizer.named_parameters("tokenizer"), *encoder.encoder.named_parameters("encoder")])
    target = dict(encoder.target.named_parameters())
    assert online.keys() == target.keys()
    with torch.no_grad():
        for parameter in online.values():
            parameter += 0.1 * torch.randn_like(parameter)
    expected = {name: 0.9 * target[name] + 0.1 * online[name] for name in online}
    trainer.update_target(0.9)
    for name, value in expected.items():
        torch.testing.assert_close(target[name], value)
    trainer.update_target(0.0)
    obs = random_observation(2)
    torch.testing.assert_close(encoder.target(obs), encoder(obs))


def test_phase1_trains_the_encoder_and_never_the_target_or_the_policy():
    trainer = build_trainer(small_config(), 1)
    trainer(phase1_batch())["loss"].backward()
    encoder = trainer.model.state_encoder
    for module in (encoder.tokenizer, encoder.encoder, encoder.predictor, trainer.inverse_dynamics):
        assert all(parameter.grad is not None for parameter in module.parameters())
    for module in (encoder.target, trainer.model.policy, trainer.model.gripper):
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in module.parameters())


def test_phase1_loss_is_the_weighted_sum_of_its_named_terms():
    losses = build_trainer(small_config("training.phase1.variance_weight=2.0"), 1)(phase1_batch())
    expected = losses["jepa_mse"] + 2 * losses["jepa_variance"] + 0.04 * losses["jepa_covariance"]
    torch.testing.assert_close(losses["loss"], expected + losses["inverse_dynamics"])


def phase1_trainer(*overrides: str) -> StateVLATrainer:
    """In double precision, and past its first step: the predictor does not copy, the target is not the encoder."""
    trainer = build_trainer(small_config(*(f"training.phase1.{override}" for override in overrides)), 1).double()
    encoder = trainer.model.state_encoder
    with torch.no_grad():
        for parameter in (*encoder.tokenizer.parameters(), *encoder.encoder.parameters()):
            parameter += 0.02 * torch.randn_like(parameter)
    nn.init.normal_(encoder.predictor.mlp[-1].weight, std=0.2)
    return trainer


def in_double(batch: dict) -> dict:
    return batch | {"actions": batch["actions"].double()}


@pytest.mark.parametrize("where", ["state", "both"])
def test_the_losses_are_the_guides_formula(where):
    trainer = phase1_trainer("inverse_dynamics_weight=0.0", f"vicreg_on={where}")
    encoder, batch = trainer.model.state_encoder, in_double(phase1_batch(8))
    z_t, target = encoder(batch["obs"]), encoder.target(batch["next_obs"])
    predicted = encoder.predictor(z_t, batch["actions"])
    regularised = {"state": [z_t], "both": [z_t, predicted]}[where]
    variance = covariance = 0
    for z in regularised:
        off_diagonal = torch.cov(z.T) * (1 - torch.eye(32))
        covariance += (off_diagonal**2).sum() / 32 / len(regularised)
        variance += (1 - (z.std(dim=0) ** 2 + 1e-4).sqrt()).clamp(min=0).mean() / len(regularised)
    losses = trainer(batch)
    torch.testing.assert_close(losses["jepa_mse"], ((predicted - target) ** 2).mean())
    torch.testing.assert_close(losses["jepa_variance"], variance)
    torch.testing.assert_close(losses["jepa_covariance"], covariance)
    expected = ((predicted - target) ** 2).mean() + variance + 0.04 * covariance
    torch.testing.assert_close(losses["loss"], expected)
    assert losses.keys() == {"jepa_mse", "jepa_variance", "jepa_covariance", "loss"}


def test_inverse_dynamics_tells_the_actions_from_z_and_the_target_state():
    trainer, batch = phase1_trainer(), in_double(phase1_batch(4))
    encoder = trainer.model.state_encoder
    told = trainer.inverse_dynamics(encoder(batch["obs"]), encoder.target(batch["next_obs"]))
    expected = ((told - batch["actions"].flatten(1)) ** 2).mean()
    torch.testing.assert_close(trainer(batch)["inverse_dynamics"], expected)


def test_validation_is_over_all_rows_whatever_the_batches():
    """Variance and covariance of two batches are not the means of theirs."""
    trainer, batch = phase1_trainer().eval(), in_double(phase1_batch(12))

    def rows(first, last):
        cut = {name: {key: value[first:last] for key, value in batch[name].items()} for name in ("obs", "next_obs")}
        return cut | {"actions": batch["actions"][first:last]}

    whole, parts = trainer.phase1_losses([batch]), trainer.phase1_losses([rows(0, 5), rows(5, 12)])
    assert whole.keys() == parts.keys() >= {"jepa_copy_mse", "z_std", "effective_rank"}
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, msg=name)
    z_t, target = (encode(batch[name]) for encode, name in (
        (trainer.model.state_encoder, "obs"), (trainer.model.state_encoder.target, "next_obs"),
    ))  # fmt: skip
    torch.testing.assert_close(whole["jepa_copy_mse"], ((z_t - target) ** 2).mean())
    torch.testing.assert_close(whole["z_std"], representation_health(z_t)["z_std"])


@pytest.mark.parametrize("mode, share", [("train", 1.0), ("train", 0.5), ("train", 0.0), ("eval", 1.0)])
def test_masking_hides_the_robot_state_of_that_share_of_the_samples_in_training_alone(mode, share):
    trainer = phase1_trainer(f"proprioception_masking={share}").train(mode == "train")
    batch = in_double(phase1_batch(64))
    moved = dict(batch)
    for name in ("obs", "next_obs"):
        other = {"joint_states": batch[name]["joint_states"] + 1, "gripper_states": batch[name]["gripper_states"] / 2}
        moved[name] = batch[name] | other
    states = {"online": [], "target": []}
    encoder = trainer.model.state_encoder
    encoder.encoder.register_forward_hook(lambda module, inputs, z: states["online"].append(z))
    encoder.target.register_forward_hook(lambda module, inputs, z: states["target"].append(z))
    for one in (batch, moved):
        torch.manual_seed(0)  # the same samples are masked
        trainer(one)
    before, after = states["online"]
    unchanged = (before == after).all(dim=1).double().mean().item()
    if share == 0.5:
        assert 0.3 < unchanged < 0.7
    else:
        assert unchanged == (share if mode == "train" else 0)
    before, after = states["target"]
    assert (before != after).any(dim=1).all()  # the target always knows


def test_foresight_tells_the_arms_own_future_without_the_actions_and_teaches_the_encoder_alone():
    trainer, batch = phase1_trainer("foresight_weight=2.0"), in_double(phase1_batch(12))
    batch["actions"].requires_grad_()
    batch["robot_ahead"] = torch.randn(12, len(FORESIGHT), 9) * 3 + 1
    trainer.robot_normalizer.fit(batch["robot_ahead"].flatten(0, 1))
    encoder, losses = trainer.model.state_encoder, trainer(batch)
    standardised = (batch["robot_ahead"] - batch["robot_ahead"].mean((0, 1))) / batch["robot_ahead"].std(
        (0, 1), correction=0
    )
    foreseen = trainer.foresight(encoder(batch["obs"]))
    assert foreseen.shape == (12, len(FORESIGHT), 9)
    torch.testing.assert_close(losses["foresight"], ((foreseen - standardised) ** 2).mean(), rtol=1e-5, atol=1e-5)
    others = losses["jepa_mse"] + losses["jepa_variance"] + 0.04 * losses["jepa_covariance"]
    torch.testing.assert_close(losses["loss"], others + losses["inverse_dynamics"] + 2 * losses["foresight"])

    losses["foresight"].backward()
    for module in (encoder.tokenizer, encoder.encoder, trainer.foresight):
        assert any(parameter.grad.abs().max() > 0 for parameter in module.parameters())
    assert all(parameter.grad is None for parameter in (*encoder.target.parameters(), *encoder.predictor.parameters()))
    assert batch["actions"].grad is None


def test_foresight_without_fitted_statistics_is_loud():
    trainer, batch = phase1_trainer("foresight_weight=1.0"), in_double(phase1_batch(4))
    batch["robot_ahead"] = torch.randn(4, len(FORESIGHT), 9)
    assert trainer(batch)["loss"].isnan()


def test_a_head_without_weight_is_not_there():
    trainer = build_trainer(small_config("training.phase1.inverse_dynamics_weight=0.0"), 1)
    assert trainer.foresight is None and trainer.inverse_dynamics is None
    assert "foresight" not in trainer(phase1_batch())
    assert not [name for name in trainer.state_dict() if not name.startswith("model.")]


# ------------------------------------------------------------------------------------------------ phase 2's losses


def test_phase2_trains_policy_and_gripper_alone():
    trainer = StateVLATrainer(fitted(build_trainer(small_config(), 2).model), 2)
    actions = torch.cat([torch.rand(4, 10, 6) - 0.5, torch.ones(4, 10, 1)], dim=-1)
    losses = trainer({"obs": random_observation(4), "actions": actions})
    losses["loss"].backward()
    torch.testing.assert_close(losses["action_loss"], losses["pos_rot_loss"] + losses["gripper_loss"])
    assert all(p.grad is not None for m in (trainer.model.policy, trainer.model.gripper) for p in m.parameters())
    assert all(p.grad is None and not p.requires_grad for p in trainer.model.state_encoder.parameters())


@pytest.mark.parametrize("frozen", [True, False])
def test_phase2_trains_tokenizer_and_encoder_where_they_are_not_frozen(frozen):
    trainer = build_trainer(small_config(f"training.phase2.freeze_encoder={str(frozen).lower()}"), 2)
    fitted(trainer.model)
    actions = torch.cat([torch.rand(4, 10, 6) - 0.5, torch.ones(4, 10, 1)], dim=-1)
    trainer({"obs": random_observation(4), "actions": actions})["loss"].backward()
    encoder = trainer.model.state_encoder
    for module in (encoder.tokenizer, encoder.encoder):
        assert module.training != frozen
        for name, parameter in module.named_parameters():
            assert (parameter.grad is None) == frozen, name
            assert frozen or parameter.grad.abs().max() > 0, name
    for module in (encoder.target, encoder.predictor):
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in module.parameters())
    assert all(parameter.grad is not None for parameter in trainer.model.policy.parameters())


@pytest.mark.parametrize(
    ("noise", "of_policy", "of_gripper"),
    [("state_noise=0.5", 0.5, 0.5), ("state_noise=0.1 gripper_noise=0.5", 0.1, 0.5), ("gripper_noise=0", 0.4, 0)],
)
def test_noise_on_z_acts_in_training_alone(monkeypatch, noise, of_policy, of_gripper):
    trainer = build_trainer(small_config(*(f"training.phase2.{one}" for one in noise.split())), 2)
    fitted(trainer.model)
    states, seen = torch.randn(2000, 32), []
    for part in (trainer.model.policy, trainer.model.gripper):
        loss = part.loss
        monkeypatch.setattr(part, "loss", lambda z_t, actions, loss=loss: seen.append(z_t) or loss(z_t, actions))
    for mode in (True, False):
        trainer.train(mode)
        trainer({"z_t": states, "actions": torch.randn(2000, 10, 7).sign()})
    scaled = trainer.model.state_scaling(states)
    for z_t, std in zip(seen[:2], (of_policy, of_gripper), strict=True):
        assert (z_t - scaled).std().item() == pytest.approx(std, rel=0.02)
    assert all(torch.equal(z_t, scaled) for z_t in seen[2:]) and len(seen) == 4


def test_the_frozen_encoder_stays_in_eval_mode():
    trainer = build_trainer(small_config(), 2).train()
    assert not any(module.training for module in trainer.model.state_encoder.modules())
    assert all(module.training for module in trainer.model.policy.modules())


def test_phase2_on_stored_states_equals_phase2_on_observations():
    trainer = StateVLATrainer(fitted(build_trainer(small_config(), 2).model), 2)
    obs, actions = random_observation(4), torch.ones(4, 10, 7) * 0.3
    actions[..., 6] = 1
    torch.manual_seed(3)
    from_obs = trainer({"obs": obs, "actions": actions})
    torch.manual_seed(3)
    from_states = trainer({"z_t": trainer.model.encode(obs).detach(), "actions": actions})
    torch.testing.assert_close(from_obs["loss"], from_states["loss"])


def test_flow_loss_is_zero_when_the_velocity_is_exact():
    policy = fitted(build_trainer(small_config(), 2).model).policy
    chunk = (torch.rand(1, 10, 6) - 0.5).expand(64, -1, -1)
    x_0 = policy.normalizer.normalize(chunk)

    def exact_velocity(x_sigma, sigma, state_token):  # x_sigma = (1 - sigma) x_0 + sigma noise, so noise - x_0 is:
        return (x_sigma - x_0) / sigma

    policy.embed_sigma = nn.Unflatten(0, (-1, 1, 1))  # sigma itself, (B, 1, 1)
    policy.velocity = exact_velocity
    assert policy.loss(torch.zeros(64, 32), chunk).max() < 1e-6


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_sampling_recovers_actions_when_the_velocity_is_exact(steps):
    policy = fitted(build_trainer(small_config(), 2).model).policy
    chunk = torch.rand(8, 10, 6) - 0.5
    x_0 = policy.normalizer.normalize(chunk)
    policy.embed_sigma = nn.Unflatten(0, (-1, 1, 1))  # sigma itself, (B, 1, 1)
    policy.velocity = lambda x, sigma, state_token: (x - x_0) / sigma
    recovered = policy.sample(torch.zeros(8, 32), steps, torch.randn(8, 10, 6))
    torch.testing.assert_close(recovered, chunk, atol=1e-5, rtol=0)


def test_sampling_embeds_state_and_sigmas_once_and_takes_the_same_euler_steps():
    policy = fitted(build_trainer(small_config(), 2).model).policy
    z_t, x_1 = torch.randn(3, 32), torch.randn(3, 10, 6)
    x = x_1
    for sigma in (1.0, 0.75, 0.5, 0.25):
        velocity = policy.velocity(x, policy.embed_sigma(torch.full((3,), sigma)), policy.embed_state(z_t)[:, None])
        x = x - velocity / 4
    expected = policy.normalizer.unnormalize(x).clamp(-1, 1)

    calls, untouched = [], x_1.clone()
    for module in (policy.embed_sigma, policy.embed_state):
        module.register_forward_hook(lambda module, *_: calls.append(module))
    torch.testing.assert_close(policy.sample(z_t, 4, x_1), expected)
    assert sorted(map(id, calls)) == sorted(map(id, (policy.embed_sigma, policy.embed_state)))
    assert torch.equal(x_1, untouched)


def test_gripper_labels_map_open_to_zero_and_close_to_one():
    gripper = build_trainer(small_config(), 2).model.gripper
    z = torch.randn(5, 32)
    commands = torch.where(torch.rand(5, 10) > 0.5, 1.0, -1.0)
    probability = gripper(z).sigmoid()
    expected = -torch.where(commands > 0, probability.log(), (1 - probability).log()).mean(dim=1)
    torch.testing.assert_close(gripper.loss(z, commands), expected)
    torch.testing.assert_close(gripper.sample(z), torch.where(probability > 0.5, 1.0, -1.0))


def test_normalizer_inverts_itself_and_leaves_a_constant_dimension_alone():
    values = torch.randn(200, 6) * torch.tensor([0.3, 0.4, 0.4, 0.02, 0.05, 0.0]) + 0.1
    normalizer = Normalizer(6)
    normalizer.fit(values)
    normalized = normalizer.normalize(values)
    torch.testing.assert_close(normalized[:, :5].std(dim=0, correction=0), torch.ones(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalized[:, 5], torch.zeros(200))
    torch.testing.assert_close(normalizer.unnormalize(normalized), values)


def tilted_states(stds: list[float], rows: int = 2_000) -> torch.Tensor:
    """States whose variance lies along rotated axes: no dimension has one of `stds` for itself."""
    rotation = torch.linalg.qr(torch.randn(len(stds), len(stds), dtype=torch.float64)).Q
    return (torch.randn(rows, len(stds), dtype=torch.float64) * torch.tensor(stds)) @ rotation + 3


class WithoutDoubles(torch.Tensor):
    """As on Apple's GPUs, which have no float64: a copy on the CPU has."""

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_what_hardly_varies_counts_as_varying_by_the_least_std():
    """As a place that never moves, whose error would otherwise count by the metre."""
    values = torch.stack([torch.full((9,), 0.3), torch.linspace(0, 0.01, 9), torch.linspace(0, 1, 9)], dim=1)
    normalizer = Normalizer(3)
    normalizer.fit(values, least_std=0.02)
    spread = values[:, 2].std(correction=0)
    torch.testing.assert_close(normalizer.std, torch.stack([torch.tensor(0.02), torch.tensor(0.02), spread]))
    normalizer.fit(values)
    assert normalizer.std[0] == 1.0 and 0 < normalizer.std[1] < 0.01


@pytest.mark.parametrize("statistics, dim", [(StateScaling, 5), (Normalizer, 5)])
def test_statistics_are_measured_in_double_precision_where_the_device_has_none(statistics, dim):
    values = torch.randn(50, dim)
    here, there = statistics(dim), statistics(dim)
    here.fit(values)
    there.fit(values.as_subclass(WithoutDoubles))
    assert here.state_dict().keys() == there.state_dict().keys()
    assert all(torch.equal(value, there.state_dict()[name]) for name, value in here.state_dict().items())


def test_standardised_states_have_unit_variance_in_every_dimension_but_constant_ones():
    states = tilted_states([2.0, 1.0, 0.5, 0.1])
    states[:, 2] = 7.0
    scaling = StateScaling(4).double()
    scaling.fit(states, "standardise")
    scaled = scaling(states)
    torch.testing.assert_close(scaled.mean(dim=0), torch.zeros(4).double(), atol=1e-5, rtol=0)
    expected = torch.tensor([1.0, 1.0, 0.0, 1.0]).double()
    torch.testing.assert_close(scaled.std(dim=0, correction=0), expected, atol=1e-5, rtol=0)
    moved = states.clone()
    moved[:, 2] += 0.3
    torch.testing.assert_close((scaling(moved) - scaled)[:, 2], torch.full((len(states),), 0.3).double())
    torch.testing.assert_close((scaling(moved) - scaled)[:, [0, 1, 3]], torch.zeros(len(states), 3).double())
    reference = Normalizer(4).double()  # the actions' own
    reference.fit(states)
    torch.testing.assert_close(scaled, reference.normalize(states), atol=1e-5, rtol=1e-5)


def test_states_are_left_alone_where_they_are_not_to_be_scaled_and_lost_where_nothing_was_fitted():
    states = torch.randn(50, 4) * 3 + 1
    scaling = StateScaling(4)
    assert scaling(states).isnan().all()
    scaling.fit(states, "none")
    assert torch.equal(scaling(states), states)


def test_the_same_generator_gives_the_same_chunk_and_zero_start_needs_none():
    model, obs = fitted(build_trainer(small_config(), 2).model), random_observation(2)
    first, second = (model.predict(obs, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, model.predict(obs, generator=torch.Generator().manual_seed(6)))
    assert torch.equal(model.predict(obs, flow_start="zero"), model.predict(obs, flow_start="zero"))
