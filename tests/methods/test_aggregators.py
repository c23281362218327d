import pytest
import torch
from torch import Tensor

from lit_multiip.methods.aggregators import (
    Aggregator,
    AgreementGate,
    AvgPool,
    Concat,
    First,
    MaxPool,
    NormAvgPool,
    OfKinds,
    SelfAttention,
    WeightedSum,
)

DIM = 12
POOLING = [First, MaxPool, AvgPool, NormAvgPool, WeightedSum]
ALL = [*POOLING, Concat, SelfAttention, AgreementGate]


def photos(batch: int = 2, count: int = 9, dim: int = DIM, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(seed))


def trained(**options) -> SelfAttention:
    """Self-attention whose weights are no longer the initial ones."""
    module = SelfAttention(DIM, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * DIM**-0.5)
    return module


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("count", [1, 2, 9])
def test_pooling_gives_one_embedding_and_the_others_one_per_photo(kind, count):
    out = kind(DIM)(photos(count=count))
    assert out.shape == (2, 1 if kind in POOLING else count, DIM)


def test_pooling_matches_its_definition():
    x = torch.tensor([[[1.0, -4.0], [3.0, 2.0], [-1.0, 5.0]]])
    assert First(2)(x).tolist() == [[[1.0, -4.0]]]
    assert MaxPool(2)(x).tolist() == [[[3.0, 5.0]]]
    assert AvgPool(2)(x).tolist() == [[[1.0, 1.0]]]
    assert torch.equal(Concat(2)(x), x)


@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("count", [1, 5, 9])
def test_self_attention_without_queries_is_average_pooling_in_every_row(heads, count):
    x = photos(count=count)
    mean = AvgPool(DIM)(x).expand_as(x)
    assert (SelfAttention(DIM, heads=heads, query_scale=0)(x) - mean).abs().max() < 1e-6


def test_untrained_residual_self_attention_is_concat():
    x = photos()
    assert torch.equal(SelfAttention(DIM, residual=True)(x), Concat(DIM)(x))


def test_the_larger_the_query_scale_the_more_every_row_keeps_to_its_own_photo():
    x = 8 * torch.nn.functional.normalize(photos(count=1) + photos(seed=3), dim=-1)  # resembling each other
    modules = [SelfAttention(DIM, query_scale=scale) for scale in (0.0, 0.05, 0.2, 1.0, 10.0)]
    own = [module.attention_weights(x).diagonal(dim1=2, dim2=3).mean().item() for module in modules]
    assert own == sorted(own) and own[0] == pytest.approx(1 / 9, abs=1e-6)
    assert (modules[0](x) - AvgPool(DIM)(x)).abs().max() < 1e-5
    assert (modules[-1](x) - Concat(DIM)(x)).abs().max() < 1e-2


@pytest.mark.parametrize("scale", [-1.0, float("inf"), float("nan")])
def test_an_impossible_query_scale_is_refused(scale):
    with pytest.raises(ValueError, match=r"query_scale must be finite and at least 0, got"):
        SelfAttention(DIM, query_scale=scale)


def test_the_first_step_moves_w_q_and_zero_w_k_would_not_let_it():
    def gradient(module):
        (module(photos()) ** 2).sum().backward()
        assert module.to_q.weight.grad is not None
        return module.to_q.weight.grad.abs().max().item()

    stuck = SelfAttention(DIM, query_scale=0)
    torch.nn.init.zeros_(stuck.to_k.weight)
    assert gradient(SelfAttention(DIM, query_scale=0)) > 1e-2
    assert gradient(stuck) == 0


def test_residual_self_attention_moves_w_v_first_and_w_q_second():
    module = SelfAttention(DIM, residual=True, query_scale=0)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        (module(photos()) ** 2).sum().backward()
        optimizer.step()
        moved.append((module.to_v.weight.abs().max().item() > 0, module.to_q.weight.abs().max().item() > 0))
    assert moved == [(True, False), (True, True)]


@pytest.mark.parametrize("options", [{}, {"heads": 3}, {"residual": True}])
def test_self_attention_matches_algorithm_1_head_by_head(options):
    module, x = trained(**options), photos()
    query, key, value = x @ module.to_q.weight.T, x @ module.to_k.weight.T, x @ module.to_v.weight.T
    width = DIM // module.heads
    rows = []
    for head in range(module.heads):
        part = slice(head * width, (head + 1) * width)
        weights = torch.softmax(query[..., part] @ key[..., part].transpose(1, 2) / width**0.5, dim=-1)
        assert torch.allclose(module.attention_weights(x)[:, head], weights, atol=1e-6)
        rows.append(weights @ value[..., part])
    expected = torch.cat(rows, dim=-1) + (x if module.residual else 0)
    assert (module(x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("options", [{}, {"heads": 3}, {"residual": True}])
def test_permuting_the_photos_permutes_the_rows_of_self_attention(options):
    module, x, order = trained(**options), photos(), torch.randperm(9, generator=torch.Generator().manual_seed(2))
    assert (module(x[:, order]) - module(x)[:, order]).abs().max() < 1e-6


@pytest.mark.parametrize("kind", [MaxPool, AvgPool])
def test_pooling_does_not_see_the_order(kind):
    x = photos()
    assert (kind(DIM)(x.flip(1)) - kind(DIM)(x)).abs().max() < 1e-6


def test_nine_equal_photos_give_what_one_gives():
    one = photos(count=1)
    nine = one.expand(-1, 9, -1)
    for module in (MaxPool(DIM), AvgPool(DIM), Concat(DIM), trained(), trained(residual=True)):
        assert (module(nine) - module(one)).abs().max() < 1e-6


def test_people_of_a_batch_do_not_mix():
    module, x = trained(), photos(batch=3)
    assert (module(x)[1] - module(x[1:2])[0]).abs().max() < 1e-6


def test_zeros_stay_zeros_since_nothing_has_a_bias():
    zeros = torch.zeros(1, 9, DIM)
    for module in (First(DIM), MaxPool(DIM), AvgPool(DIM), Concat(DIM), trained(), trained(residual=True)):
        assert torch.equal(module(zeros), torch.zeros_like(module(zeros)))


def test_attention_weights_without_queries_are_uniform_and_all_sum_to_one():
    x = photos()
    untrained = SelfAttention(DIM, heads=2, query_scale=0)
    assert torch.allclose(untrained.attention_weights(x), torch.full((2, 2, 9, 9), 1 / 9))
    weights = trained(heads=2).attention_weights(x)
    assert (weights.sum(-1) - 1).abs().max() < 1e-6
    assert weights.std() > 1e-3


def test_self_attention_has_three_square_matrices_and_the_gate_one_and_a_temperature():
    counts = [sum(p.numel() for p in kind(DIM).parameters()) for kind in ALL]
    assert counts == [0] * 6 + [3 * DIM**2, DIM**2 + 1]


@pytest.mark.parametrize("kind", ALL)
def test_a_wrong_width_names_both(kind):
    with pytest.raises(ValueError, match=r"width 12, got width 7"):
        kind(DIM)(photos(dim=7))


@pytest.mark.parametrize("kind", ALL)
def test_no_photo_and_no_batch_dimension_are_refused(kind):
    with pytest.raises(ValueError, match="no photo"):
        kind(DIM)(photos(count=0))
    with pytest.raises(ValueError, match=r"shape \(B, N, D\), got \(9, 12\)"):
        kind(DIM)(photos()[0])


@pytest.mark.parametrize("heads", [5, 0, -1])
def test_heads_must_divide_the_width(heads):
    with pytest.raises(ValueError, match=f"heads={heads} does not divide the embedding width 12"):
        SelfAttention(DIM, heads=heads)


def test_the_base_class_and_an_empty_width_are_refused():
    with pytest.raises(TypeError):
        Aggregator(DIM)
    with pytest.raises(ValueError, match="dim=0"):
        AvgPool(0)


# What photos get to say


@pytest.mark.parametrize("kind", ALL)
def test_photo_weights_sum_to_one_where_they_can_be_read_off(kind):
    module = kind(DIM)
    weights = module.photo_weights(photos())
    assert (weights is None) == (module.weights_are is None) == (kind in (First, AvgPool, NormAvgPool, Concat))
    if weights is not None:
        assert weights.shape == (2, 9) and (weights >= 0).all()
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))


def test_attention_without_queries_is_even_and_trained_attention_is_not():
    even = SelfAttention(DIM, query_scale=0).photo_weights(photos())
    torch.testing.assert_close(even, torch.full((2, 9), 1 / 9))
    assert (trained(heads=3).photo_weights(photos()).std(dim=1) > 1e-2).all()


def test_attention_is_largest_for_the_photo_whose_key_all_queries_meet():
    module = SelfAttention(2)
    with torch.no_grad():
        module.to_q.weight.copy_(torch.eye(2))
    x = torch.tensor([[[1.0, 1.0], [4.0, 1.0], [1.0, 2.0]]])
    assert module.photo_weights(x)[0].argmax() == 1
    rows = torch.softmax(x[0] @ x[0].T / 2**0.5, dim=-1)
    torch.testing.assert_close(module.photo_weights(x)[0], rows.mean(dim=0))


def test_dimensions_are_won_by_the_maximum_and_ties_are_divided():
    x = torch.tensor([[[5.0, 0.0, 1.0, 7.0], [1.0, 0.0, 2.0, 3.0], [1.0, -1.0, 2.0, 7.0]]])
    assert MaxPool(4).photo_weights(x).tolist() == [[(1 + 0.5 + 0.5) / 4, (0.5 + 0.5) / 4, (0.5 + 0.5) / 4]]


def test_norm_average_does_not_change_when_one_photo_grows_longer_but_for_its_norm():
    x = photos(batch=1, count=3)
    longer = x * torch.tensor([1.0, 1.0, 10.0])[None, :, None]
    cosine = torch.cosine_similarity(NormAvgPool(DIM)(x), NormAvgPool(DIM)(longer), dim=-1)
    assert cosine.item() == pytest.approx(1, abs=1e-6)
    assert NormAvgPool(DIM)(longer).norm().item() == pytest.approx(longer.norm(dim=2).mean().item(), rel=1e-6)
    assert torch.cosine_similarity(AvgPool(DIM)(x), AvgPool(DIM)(longer), dim=-1).item() < 0.99


def test_a_weighted_sum_gives_a_stranger_less_than_a_ninth_and_at_a_high_temperature_is_the_average():
    person = torch.randn(1, 1, DIM, generator=torch.Generator().manual_seed(0)) * 3
    x = person + photos(batch=1)
    x[:, 4] = -person[:, 0]
    weights = WeightedSum(DIM)(x), WeightedSum(DIM).photo_weights(x)
    assert weights[1][0, 4] < 1e-3 and weights[1].sum().item() == pytest.approx(1)
    assert torch.allclose(WeightedSum(DIM, temperature=1e6)(x), AvgPool(DIM)(x), atol=1e-4)
    with pytest.raises(ValueError, match="temperature=0"):
        WeightedSum(DIM, temperature=0)


def test_agreement_gate_replaces_a_stranger_and_keeps_those_who_agree():
    person = photos(batch=4, count=1) + 0.3 * photos(batch=4, seed=3)  # eight that resemble each other, and a stranger
    x = torch.cat([person[:, :8], photos(batch=4, count=1, seed=9)], dim=1)
    module = AgreementGate(DIM, temperature=0.05)
    out, weights = module(x), module.photo_weights(x)
    assert (weights[:, 8] < 0.01).all()
    kept = (out[:, :8] - x[:, :8]).norm(dim=2) / x[:, :8].norm(dim=2)
    mean = (weights[:, :8, None] * x[:, :8]).sum(dim=1)
    assert kept.median() < 0.05 and ((out[:, 8] - mean).norm(dim=1) < 0.1 * mean.norm(dim=1)).all()


def test_agreement_gate_is_concat_at_a_high_temperature_and_for_photos_that_agree_alike():
    x = photos()
    assert (AgreementGate(DIM, temperature=1e4)(x) - x).abs().max() < 1e-3
    assert torch.equal(AgreementGate(DIM)(x[:, :1]), x[:, :1])  # one photo has none to agree with
    assert (AgreementGate(DIM)(x[:, :2]) - x[:, :2]).abs().max() < 1e-6  # of two each agrees as well as the other


def test_agreement_gate_learns_its_temperature():
    module = AgreementGate(DIM)
    module(photos()).square().sum().backward()
    assert module.log_temperature.grad.abs() > 1e-4 and module.to_v.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("kind", [WeightedSum, AgreementGate])
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_an_impossible_temperature_is_refused(kind, temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature} must be above 0"):
        kind(DIM, temperature=temperature)


def test_self_attention_that_does_not_attend_is_concat_with_the_same_matrix():
    x, module, control = photos(), trained(attend=False), Concat(DIM, linear=True)
    control.to_v.load_state_dict(module.to_v.state_dict())
    assert torch.equal(module(x), control(x))
    assert (trained()(x) - control(x)).abs().max() > 0.1
    assert str(trained(attend=False)) == str(trained())  # a trained model may be drawn without its attention
    assert torch.equal(Concat(DIM, linear=True)(x), x)  # untrained


def test_pooled_self_attention_is_the_mean_of_its_rows_and_another_method_to_a_checkpoint():
    x = photos()
    assert torch.allclose(trained(pool="mean")(x), trained()(x).mean(1, keepdim=True), atol=1e-6)
    assert trained(pool="mean").extra_repr() != trained().extra_repr()


# Patch tokens


def tokens(batch: int = 2, count: int = 9, places: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, places, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", [*POOLING, Concat])
def test_patch_tokens_are_aggregated_at_each_place_by_itself(kind):
    module, x = kind(DIM), tokens()
    out = module(x)
    assert out.shape == (2, 1 if kind in POOLING else 9, 5, DIM)
    for place in range(5):
        assert torch.allclose(out[:, :, place], module(x[:, :, place]), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"heads": 3}, {"residual": True}])
def test_self_attention_is_over_all_tokens_of_all_photos(options):
    module, x = trained(**options), tokens()
    out = module(x)
    assert out.shape == x.shape
    assert (out.flatten(1, 2) - module(x.flatten(1, 2))).abs().max() < 1e-6
    pooled = trained(pool="mean", **options)
    assert (pooled(x) - out.mean(dim=1, keepdim=True)).abs().max() < 1e-6  # of photos, not of tokens
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    assert (module(x[:, order]) - out[:, order]).abs().max() < 1e-6
    assert (module(x[:, :1]) - out[:, :1]).abs().max() > 1e-2  # the other photos count


@pytest.mark.parametrize("kind", ALL)
def test_photo_weights_of_patch_tokens_sum_to_one(kind):
    weights = kind(DIM).photo_weights(tokens())
    assert (weights is None) == (kind(DIM).weights_are is None)
    if weights is not None:
        assert weights.shape == (2, 9)
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))
    rows = trained(heads=2).attention_weights(tokens())
    assert rows.shape == (2, 2, 9, 9)
    torch.testing.assert_close(rows.sum(dim=3), torch.ones(2, 2, 9))


@pytest.mark.parametrize("kind", ALL)
def test_where_an_adapter_takes_two_kinds_each_is_aggregated_by_itself(kind):
    shapes = {"face": (4,), "tokens": (5, DIM)}
    parts = {"face": kind(4), "tokens": kind(DIM)}
    both, face, patches = OfKinds(parts, shapes), photos(dim=4), tokens()
    out = both(torch.cat([face, patches.flatten(2)], dim=2))
    expected = torch.cat([parts["face"](face), parts["tokens"](patches).flatten(2)], dim=2)
    assert torch.equal(out, expected) and both.name == kind.__name__
    weights = both.photo_weights(torch.cat([face, patches.flatten(2)], dim=2))
    assert weights is None or torch.allclose(weights.sum(dim=1), torch.ones(2))
