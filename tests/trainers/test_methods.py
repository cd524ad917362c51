"""The methods' update equations, against hand-checked vectors, fixed points and the convergence lemma."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.graph_ops.progress import Progress
from prune_onnx.trainers.config import Schedule, TrainConfig
from prune_onnx.trainers.methods import METHODS, method_class
from prune_onnx.trainers.methods.network_slimming import NetworkSlimming
from prune_onnx.trainers.methods.plain import Plain
from prune_onnx.trainers.methods.proximal_ns import ProximalNS, reach


class Warnings(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, message: str) -> None:
        self.said.append(message)


LONG = Schedule(lr=0.1, steps_per_epoch=782, epochs=160)
SHORT = Schedule(lr=0.1, steps_per_epoch=5, epochs=2)


def scale(*values: float) -> nn.BatchNorm1d:
    """A BatchNorm layer in float64 whose scale is a free variable of a problem."""
    norm = nn.BatchNorm1d(len(values)).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(values))
    return norm


def proximal(norm: nn.Module, *, gamma: float | None = None, xi: float | None = None, **options: object) -> ProximalNS:
    method = ProximalNS(**options)
    method.prepare(norm, SHORT)
    with torch.no_grad():
        if gamma is not None:
            norm.weight.fill_(gamma)
        if xi is not None:
            norm.xi.fill_(xi)
    return method


def config(**options: object) -> TrainConfig:
    needed = {"model": "x", "dataset": "x", "method": "proximal-ns", "output": "x", "epochs": 160}
    return TrainConfig(**{**needed, **options})


def deep() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Flatten()
    )


# Registry


@pytest.mark.parametrize("name", METHODS.names())
def test_every_listed_method_has_its_name_a_summary_and_options_of_the_run(name: str) -> None:
    method = method_class(name)
    assert method.name == name
    assert method.__doc__
    assert method.__module__.startswith("prune_onnx.trainers.methods.")
    assert set(method.options()) <= set(TrainConfig.model_fields)


def test_unknown_method_names_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'proximal'.*Did you mean 'proximal-ns'"):
        method_class("proximal")


@pytest.mark.parametrize("name", ["network-slimming", "proximal-ns"])
def test_network_without_batchnorm_is_refused(name: str) -> None:
    method_class(name).check(deep())
    with pytest.raises(ConfigError, match=f"'{name}' works on the scales of BatchNorm"):
        method_class(name).check(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)))


# Network slimming


def test_network_slimming_adds_the_sign_of_the_scale_to_its_gradient() -> None:
    norm = scale(0.5, -0.25, 0.0)
    method = NetworkSlimming(lambda_=0.01)
    method.prepare(norm, LONG)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -0.25, 0.0]))
    norm.weight.grad = torch.tensor([1.0, 1.0, 1.0]).double()
    norm.bias.grad = torch.zeros(3).double()
    method.before_step()
    assert norm.weight.grad.tolist() == pytest.approx([1.01, 0.99, 1.0], abs=1e-15)
    assert norm.bias.grad.tolist() == [0, 0, 0]


def test_network_slimming_moves_by_lr_lambda_over_one_minus_momentum() -> None:
    norm = scale(0.5)
    method = NetworkSlimming(lambda_=1e-4)
    method.prepare(norm, LONG)
    optimizer = torch.optim.SGD([norm.weight], lr=0.1, momentum=0.9)
    before = None
    for _ in range(300):
        before = norm.weight.item()
        norm.weight.grad = torch.zeros(1).double()
        method.before_step()
        optimizer.step()
    assert before - norm.weight.item() == pytest.approx(0.1 * 1e-4 / 0.1, rel=1e-9)


def test_network_slimming_skips_frozen_scales() -> None:
    norm = scale(0.5)
    method = NetworkSlimming(lambda_=1e-4)
    method.prepare(norm, LONG)
    method.before_step()
    assert norm.weight.grad is None


def test_network_slimming_keeps_published_lambda_on_the_published_schedule() -> None:
    for model, value in (("vgg19", 1e-4), ("resnet164", 1e-5), ("densenet40", 1e-5)):
        found = NetworkSlimming.defaults(config(model=model, method="network-slimming"), LONG)
        assert found == {"lambda_": value, "init_gamma": 0.5}


# Proximal network slimming: one step


@pytest.mark.parametrize(
    ("penalty", "lambda_", "gamma", "xi"),
    [(100.0, 0.0045, 0.4818181818, 0.4816119835), (0.25, 0.002, 0.4995121951, 0.4802807852)],
)
def test_proximal_step_gives_the_hand_checked_values(penalty: float, lambda_: float, gamma: float, xi: float) -> None:
    norm = scale(0.0)
    method = proximal(norm, gamma=0.5, xi=0.48, penalty=penalty, lambda_=lambda_)
    method.after_step(0.1)
    assert norm.weight.item() == pytest.approx(gamma, abs=1e-10)
    assert norm.xi.item() == pytest.approx(xi, abs=1e-10)


@given(
    gamma=st.floats(-2, 2), xi=st.floats(-2, 2), gradient=st.floats(-5, 5),
    lr=st.floats(1e-4, 1), penalty=st.floats(0.01, 200), lambda_=st.floats(0, 1),
)  # fmt: skip
def test_proximal_update_after_plain_sgd_is_equation_8b_and_step_4(
    gamma: float, xi: float, gradient: float, lr: float, penalty: float, lambda_: float
) -> None:
    norm = scale(0.0)
    method = proximal(norm, gamma=gamma, xi=xi, penalty=penalty, lambda_=lambda_)
    norm.weight.grad = torch.tensor([gradient], dtype=torch.float64)
    torch.optim.SGD([norm.weight], lr=lr).step()
    method.after_step(lr)
    alpha = 1 / lr
    new_gamma = (alpha * gamma + penalty * xi) / (alpha + penalty) - gradient / (alpha + penalty)
    mean = (alpha * xi + penalty * new_gamma) / (alpha + penalty)
    new_xi = math.copysign(max(abs(mean) - lambda_ / (alpha + penalty), 0), mean)
    assert norm.weight.item() == pytest.approx(new_gamma, abs=1e-12)
    assert norm.xi.item() == pytest.approx(new_xi, abs=1e-12)


def test_threshold_gives_exact_zero_at_its_edge_and_not_beyond() -> None:
    norm = nn.BatchNorm1d(3)  # float32, as in training
    method = proximal(norm, lambda_=1.0, penalty=1.0)
    threshold = 0.5  # lambda / (alpha + penalty) with alpha = 1
    with torch.no_grad():
        values = torch.tensor([threshold, -threshold, math.nextafter(threshold, 1) + 1e-6])
        norm.weight.copy_(values)
        norm.xi.copy_(values)
    method.after_step(1.0)
    assert (norm.xi == 0).tolist() == [True, True, False]


def test_every_epoch_updates_after_the_epoch_only() -> None:
    norm = scale(0.0)
    method = proximal(norm, gamma=0.5, xi=0.48, penalty=100.0, lambda_=0.0045, every="epoch")
    method.after_step(0.1)
    assert (norm.weight.item(), norm.xi.item()) == (0.5, pytest.approx(0.48))
    method.after_epoch(0.1)
    assert norm.xi.item() == pytest.approx(0.4816119835, abs=1e-10)
    stepwise = proximal(scale(0.0), gamma=0.5, xi=0.48, penalty=100.0, lambda_=0.0045)
    before = stepwise._norms[0].xi.item()
    stepwise.after_epoch(0.1)
    assert stepwise._norms[0].xi.item() == before


# Proximal network slimming: fixed points of f = (gamma - a)^2 / 2


def fixed_point(target: float, momentum: float, nesterov: bool = False, steps: int = 6000) -> tuple[float, float]:
    norm = scale(0.0)
    method = proximal(norm, gamma=0.5, xi=0.48, penalty=100.0, lambda_=0.0045)
    optimizer = torch.optim.SGD([norm.weight], lr=0.1, momentum=momentum, nesterov=nesterov)
    for _ in range(steps):
        norm.weight.grad = norm.weight.detach() - target
        optimizer.step()
        method.after_step(0.1)
    return norm.weight.item(), norm.xi.item()


@pytest.mark.parametrize("nesterov", [False, True])
def test_live_channel_settles_at_lambda_times_one_minus_momentum(nesterov: bool) -> None:
    gamma, xi = fixed_point(0.5, 0.9, nesterov)
    assert gamma == pytest.approx(0.5 - 4.5e-4, abs=1e-8)
    assert gamma - xi == pytest.approx(4.5e-5, abs=1e-8)


def test_dead_channel_keeps_a_small_scale_and_zero_xi() -> None:
    gamma, xi = fixed_point(0.0003, 0.9)
    assert xi == 0
    assert gamma == pytest.approx(0.0003 / (1 + 0.1 * 100), abs=1e-10)


@pytest.mark.parametrize(("momentum", "edge"), [(0.0, 0.004545), (0.9, 0.000495)])
def test_dead_zone_ends_at_lambda_times_one_minus_momentum_plus_the_gap(momentum: float, edge: float) -> None:
    # Dead iff |gradient| <= lambda * (1 - m) at gamma = lambda / penalty, so up to lambda * (1 - m) + lambda / penalty.
    assert edge == pytest.approx(0.0045 * (1 - momentum) + 0.0045 / 100)
    assert fixed_point(edge * 0.99, momentum, steps=20_000)[1] == 0
    assert fixed_point(edge * 1.01, momentum, steps=20_000)[1] > 0


# Proximal network slimming: Lemma 3


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000), penalty=st.floats(0.1, 100), lambda_=st.floats(0, 2), over=st.floats(1.01, 5),
)  # fmt: skip
def test_objective_never_rises_under_full_gradients(seed: int, penalty: float, lambda_: float, over: float) -> None:
    """F(Z+) - F(Z) <= (L - alpha) / 2 * |Z+ - Z|^2 for alpha > L, on a smooth problem that is not convex."""
    draws = torch.Generator().manual_seed(seed)
    rows = torch.randn(8, 5, generator=draws, dtype=torch.float64)
    offset = torch.randn(8, generator=draws, dtype=torch.float64)
    lipschitz = 2 * torch.linalg.matrix_norm(rows, 2).item() ** 2  # |(log(1 + t^2))''| <= 2
    norm = scale(*([0.0] * 3))
    method = proximal(norm, penalty=penalty, lambda_=lambda_)
    other = torch.randn(2, generator=draws, dtype=torch.float64).requires_grad_()

    def loss() -> torch.Tensor:
        return torch.log1p((rows @ torch.cat([norm.weight, other]) - offset).square()).sum()

    def state() -> torch.Tensor:
        return torch.cat([norm.weight.detach(), other.detach(), norm.xi]).clone()

    def objective() -> float:
        gap = (norm.weight - norm.xi).square().sum()
        return (loss() + lambda_ * norm.xi.abs().sum() + penalty / 2 * gap).item()

    alpha = over * lipschitz
    optimizer = torch.optim.SGD([norm.weight, other], lr=1 / alpha)
    value, at = objective(), state()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        method.after_step(1 / alpha)
        step = (state() - at).square().sum().item()
        fallen = objective()
        assert fallen - value <= (lipschitz - alpha) / 2 * step + 1e-10 * max(1, abs(value))
        value, at = fallen, state()


# Proximal network slimming: state, schedule, finish


def test_starts_at_the_papers_values_from_the_seed() -> None:
    first, again, other = deep(), deep(), deep()
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        torch.manual_seed(seed * 17)  # the global generator must not matter
        ProximalNS(lambda_=0.0045, penalty=100.0).prepare(model, LONG, seed=seed)
    xi = torch.cat([first[1].xi, first[4].xi])
    assert (xi >= 0.47).all()
    assert (xi <= 0.50).all()
    assert xi.std() > 0.003
    assert (first[1].weight == 0.5).all()
    assert (first[4].weight == 0.5).all()
    assert torch.equal(first[1].xi, again[1].xi)
    assert not torch.equal(first[1].xi, other[1].xi)


def test_xi_is_state_of_the_network_and_moves_with_it() -> None:
    model = deep()
    method = ProximalNS(lambda_=0.0045, penalty=100.0)
    method.prepare(model, LONG)
    assert {"1.xi", "4.xi"} <= model.state_dict().keys()
    model.double()  # replaces buffers, as a move to another device does
    method.after_step(0.1)
    assert model[1].xi.dtype == torch.float64
    kept = copy.deepcopy(model.state_dict())
    method.after_step(0.1)
    assert not torch.equal(model[1].xi, kept["1.xi"])
    model.load_state_dict(kept)
    assert torch.equal(model[1].xi, kept["1.xi"])


def test_finish_zeroes_gamma_where_xi_is_zero_and_nothing_else() -> None:
    model = deep()
    method = ProximalNS(lambda_=0.0045, penalty=100.0)
    method.prepare(model, LONG)
    with torch.no_grad():
        model[1].xi[[0, 2]] = 0
        model[1].weight.copy_(torch.tensor([1e-5, 0.3, -1e-4, 0.0]))
        model[1].bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    before = copy.deepcopy(model.state_dict())
    assert method.sparsity(model) == {"channels": 10, "dead_channels": 2}
    facts = method.finish(model)
    after = model.state_dict()
    # Channel 3 has gamma 0 by chance: it computes a constant, so it is dead as well once gamma decides.
    assert facts == {"channels": 10, "dead_channels": 3}
    assert after["1.weight"].tolist() == [0, pytest.approx(0.3), 0, 0]
    assert after.keys() == before.keys() - {"1.xi", "4.xi"}
    assert all(torch.equal(after[key], before[key]) for key in after if key != "1.weight")


@pytest.mark.parametrize(("penalty", "per_step", "steps"), [(100.0, 3.75e-5, 13_333), (0.25, 9.88e-5, 5062)])
def test_drift_without_gradient_is_lambda_over_two_alpha_plus_penalty(
    penalty: float, per_step: float, steps: int
) -> None:
    lambda_ = {100.0: 0.0045, 0.25: 0.002}[penalty]
    norm = scale(0.0)
    method = proximal(norm, gamma=0.5, xi=0.5, penalty=penalty, lambda_=lambda_)
    one = Schedule(lr=0.1, steps_per_epoch=1, epochs=1, kind="constant")
    assert lambda_ * reach(one, penalty, "step") == pytest.approx(per_step, rel=1e-3)
    share = penalty / (10 + penalty)
    for _ in range(1000):
        method.after_step(0.1)
    mean = ((1 - share) * norm.weight.item() + norm.xi.item()) / (2 - share)
    assert 0.5 - mean == pytest.approx(1000 * per_step, rel=1e-3)
    taken = 1000
    while norm.xi.item() != 0:
        method.after_step(0.1)
        taken += 1
    assert taken == pytest.approx(steps, rel=0.01)


@pytest.mark.parametrize(
    ("model", "lambda_", "penalty"),
    [
        ("vgg19", 0.0045, 100.0),
        ("densenet40", 0.004, 100.0),
        ("resnet110", 0.002, 1.0),
        ("resnet164", 0.002, 0.25),
        ("resnet20", 0.002, 10.0),
    ],
)
def test_defaults_are_published_on_the_published_schedule(model: str, lambda_: float, penalty: float) -> None:
    found = ProximalNS.defaults(config(model=model), LONG)
    assert found == {"lambda_": lambda_, "penalty": penalty, "every": "step", "init_gamma": 0.5}


@pytest.mark.parametrize("model", ["vgg19", "resnet164", "bn-cnn"])
@pytest.mark.parametrize("kind", ["step", "cosine", "constant"])
def test_default_lambda_lets_channels_die_on_a_short_schedule(model: str, kind: str) -> None:
    short = Schedule(lr=0.1, steps_per_epoch=40, epochs=20, kind=kind, warmup_epochs=2)
    found = ProximalNS.defaults(config(model=model), short)
    assert found["penalty"] >= 10
    told = Warnings()
    norm = scale(0.5)
    method = ProximalNS(**found)
    method.prepare(norm, short, progress=told)
    for step in range(short.steps):
        method.after_step(short.at(step))
    assert told.said == []
    assert norm.xi.item() == 0


@pytest.mark.parametrize("name", ["network-slimming", "proximal-ns"])
def test_default_lambda_is_not_raised_without_limit(name: str) -> None:
    tiny = Schedule(lr=0.1, steps_per_epoch=2, epochs=2)
    found = method_class(name).defaults(config(model="vgg19", method=name), tiny)
    assert found["lambda_"] * {"network-slimming": 1, "proximal-ns": 0.1}[name] == pytest.approx(0.02)


def test_warning_comes_exactly_when_no_channel_can_die_and_its_advice_works() -> None:
    short = Schedule(lr=0.1, steps_per_epoch=10, epochs=10, kind="constant")
    told = Warnings()
    ProximalNS(lambda_=0.0045, penalty=100.0).prepare(scale(0.5), short, progress=told)
    assert len(told.said) == 1
    assert "no channel can die" in told.said[0]
    epochs = int(told.said[0].split("--epochs ")[1].split()[0])
    lambda_ = float(told.said[0].split("--lambda ")[1].split()[0])
    assert epochs == math.ceil(0.47 / (0.0045 / 120) / 10)
    assert lambda_ == pytest.approx(0.47 / (100 / 120), rel=0.02)
    told = Warnings()
    ProximalNS(lambda_=0.0045, penalty=100.0).prepare(
        scale(0.5), Schedule(lr=0.1, steps_per_epoch=10, epochs=epochs, kind="constant"), progress=told
    )
    ProximalNS(lambda_=1.05 * lambda_, penalty=100.0).prepare(scale(0.5), short, progress=told)
    assert told.said == []


def test_the_printed_algorithm_is_warned_about_with_its_own_values() -> None:
    told = Warnings()
    found = {**ProximalNS.defaults(config(model="vgg19", every="epoch"), LONG), "every": "epoch"}
    assert found["lambda_"] == 0.0045
    ProximalNS(**found).prepare(scale(0.5), LONG, progress=told)
    assert "no channel can die" in told.said[0]
    assert "--every step" in told.said[0]


def test_a_given_penalty_decides_the_default_lambda() -> None:
    short = Schedule(lr=0.1, steps_per_epoch=100, epochs=20)
    weak, strong = (
        ProximalNS.defaults(config(model="bn-cnn", penalty=penalty), short)["lambda_"] for penalty in (1.0, 100.0)
    )
    assert strong > 3 * weak


# Plain


def test_plain_leaves_scales_alone_unless_told() -> None:
    model = deep()
    before = copy.deepcopy(model.state_dict())
    Plain().prepare(model, LONG)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    Plain(init_gamma=0.5).prepare(model, LONG)
    assert (model[1].weight == 0.5).all()
    assert Plain().finish(nn.Linear(2, 2)) == {"channels": 0, "dead_channels": 0}
