"""benchmark/figures/reformulations.py: the family of c - u, its fixed points and its losses."""

from benchmark.figures import reformulations as toy

import pytest
import torch
from conftest import rng

import meanflowql_offline_to_online as script

VALID = "z - u", "u", "t - u", "2z - u", "2 - u"
NOISE = torch.randn((500, 2), generator=rng())


def test_the_chosen_form_is_the_scripts_loss():
    torch.manual_seed(0)
    policy, args = script.ResidualPolicy(1, 2, 16, 2), script.Args()
    torch.nn.init.normal_(policy.net.rest[-1].weight)
    arguments = torch.zeros(64, 1), toy.draw_modes(64), torch.randn(64, 2), torch.rand(64, 1)
    ours, _ = script.policy_loss(policy, *arguments, args)
    assert toy.loss(toy.FORMS["z - u"], policy, *arguments, args).item() == pytest.approx(
        ours.item()
    )
    action = toy.one_step(toy.FORMS["z - u"], policy, NOISE)
    torch.testing.assert_close(action, script.generate(policy, torch.zeros(500, 1), NOISE))


@pytest.mark.parametrize("name", toy.FORMS)
def test_growth_is_the_derivative_of_t_c(name):
    """Along a path z = (1 - t) a + t e; u, whose c is 0, among them."""
    z = "(1 - t) * a + t * e"
    c = {
        "z - u": z,
        "u": "0 * e",
        "t - u": "t + 0 * e",
        "2z - u": f"2 * ({z})",
        "2 - u": "2 + 0 * e",
    }
    c = (c | {"te - u": "t * e", "e - u": "e"})[name]
    a, e = torch.randn((2, 9, 2), generator=rng(1), dtype=torch.float64)
    t = torch.rand((9, 1), generator=rng(2), dtype=torch.float64)

    def at(t):
        return t * eval(c, {"t": t, "a": a, "e": e})

    form, z_t = toy.FORMS[name], (1 - t) * a + t * e
    slope = (at(t + 1e-5) - at(t - 1e-5)) / 2e-5
    torch.testing.assert_close(form.growth(z_t, t, e, e - a), slope)
    torch.testing.assert_close(form.end(e), at(torch.ones_like(t)))


def test_conditional_means_are_those_of_samples():
    """E[a | z] and E[e | z] by weighing the same 400,000 pairs around a point."""
    torch.manual_seed(0)
    a, e = toy.draw_modes(400_000), torch.randn(400_000, 2)
    for t in 0.3, 0.8:
        z = torch.tensor([[0.2, -0.1]])
        near = ((1 - t) * a + t * e - z).square().sum(1) < 0.05**2
        means = toy.conditional_means(z, t)
        for mean, sample in zip(means, (a[near], e[near]), strict=True):
            assert (mean[0] - sample.mean(0)).abs().max() < 4 * sample.std() / len(
                sample
            ) ** 0.5 + 0.01


@pytest.mark.parametrize("name", VALID)
def test_forms_of_z_and_t_end_at_the_flow(name):
    """One optimum for all: from each noise the action that the exact flow carries it to."""
    actions = toy.fixed_point(toy.FORMS[name], NOISE, 200)
    expected = toy.fixed_point(toy.FORMS["z - u"], NOISE, 200)
    torch.testing.assert_close(actions, expected, rtol=0, atol=1e-4)
    assert toy.errors(actions)["distance"] < 0.08


def test_forms_with_the_samples_noise_cannot():
    """e - u ends at the time average of E[a | z_t] along the flow, between the modes."""
    for name, low, high in ("e - u", 0.35, 0.41), ("te - u", 0.13, 0.18):
        actions = toy.fixed_point(toy.FORMS[name], NOISE, 200)
        assert low < toy.errors(actions)["distance"] < high
        flow = toy.fixed_point(toy.FORMS["z - u"], NOISE, 200)
        assert (actions.norm(dim=1) < flow.norm(dim=1)).float().mean() > 0.95  # towards the centre


@pytest.mark.slow
def test_training_agrees_with_the_fixed_points():
    for name, low, high in ("z - u", 0, 0.15), ("e - u", 0.25, 1):
        form = toy.FORMS[name]
        actions = toy.one_step(form, toy.train(form, 0, 2000), NOISE)
        assert low < toy.errors(actions)["distance"] < high


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    samples = dict.fromkeys(toy.FORMS, NOISE)
    rows = [{"form": name, "what": "learnt", "distance": "0.1"} for name in toy.FORMS]
    toy.draw(rows, samples, samples, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
