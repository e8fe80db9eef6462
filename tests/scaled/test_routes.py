"""What vLLM says about routes, made into those of a Rollout; all else is refused with its count."""
import numpy as np
import pytest
import torch

from scaled.engine import EngineError
from scaled.replay import check_routes, repeated
from scaled.rollout import normalise_routes


def routed(rows, layers, dense, top_k, experts, dtype=np.uint8, seed=0):
    """Valid routes as vLLM gives them: (rows, layers, top_k), zeros in dense layers."""
    random = np.random.default_rng(seed)
    ids = np.stack([random.permutation(experts)[:top_k] for _ in range(rows * layers)])
    ids = ids.reshape(rows, layers, top_k).astype(dtype)
    ids[:, dense] = 0
    return ids


@pytest.mark.parametrize("experts, dtype, expected", [
    (8, np.uint8, torch.uint8), (256, np.uint8, torch.uint8), (300, np.uint16, torch.int16),
    (8, np.int32, torch.uint8), (300, np.int64, torch.int16)])
@pytest.mark.parametrize("extra", [0, 1])
def test_normalised_routes(experts, dtype, expected, extra):
    raw = routed(5 + extra, 4, [0, 2], 3, experts, dtype)
    routes = normalise_routes(raw, rows=5, layers=[1, 3], n_hidden_layers=4, top_k=3,
                              n_experts=experts)
    assert routes.dtype == expected and routes.shape == (5, 2, 3)
    for t in range(5):
        for column, layer in enumerate((1, 3)):
            assert routes[t, column].tolist() == raw[t, layer].tolist()
    assert experts != 300 or routes.max() > 255


def change(array, index, value):
    array = array.copy()
    array[index] = value
    return array


GOOD = routed(6, 4, [0], 3, 8, np.int32)


@pytest.mark.parametrize("raw, message", [
    (None, "6 of 6 rows are missing"),
    (GOOD[:4], "2 of 6 rows are missing"),
    (np.concatenate([GOOD, GOOD[:2]]), r"shape \(8, 4, 3\), expected 6 or 7 rows of \(4, 3\)"),
    (GOOD[:, 1:], r"shape \(6, 3, 3\)"),
    (GOOD[:, :, :2], r"shape \(6, 4, 2\)"),
    (GOOD.astype(np.float32), "dtype float32"),
    (change(GOOD, (2, 0, 1), 5), "1 of 1 dense layers have routes"),
    (np.roll(GOOD, 1, 1), "1 of 1 dense layers have routes"),
    (change(GOOD, (3, 2, 1), 8), "1 of 54 ids are not below 8"),
    (change(GOOD, (3, 2, 1), -1), "1 of 54 ids are not below 8"),
    (change(GOOD, (3, 2, 1), 264), "1 of 54 ids are not below 8"),  # would wrap to 8 in uint8
    (change(GOOD, (3, 2), [4, 1, 4]), "1 of 18 .token, layer. pairs"),
    (change(GOOD, (slice(2, 4)), 0), "6 of 18 .token, layer. pairs"),
    (np.zeros_like(GOOD), "18 of 18 .token, layer. pairs")])
def test_routes_that_are_refused(raw, message):
    with pytest.raises(EngineError, match=message):
        normalise_routes(raw, rows=6, layers=[1, 2, 3], n_hidden_layers=4, top_k=3, n_experts=8)


def test_repeated_experts_are_found_wherever_they_stand():
    """All rows of three ids below four, the axis of the experts in front."""
    rows = torch.cartesian_prod(*[torch.arange(4)] * 3)
    for dtype in (torch.uint8, torch.int16):
        found = repeated(rows.to(dtype).T.unflatten(1, (8, 8)))
        assert found.flatten().tolist() == [len({*row}) < 3 for row in rows.tolist()]
    assert not repeated(torch.zeros(1, 5, dtype=torch.uint8)).any()  # a single expert repeats nobody


def test_ids_beyond_the_model_are_refused_in_every_width():
    mask = torch.tensor([[True, True, False]])
    for dtype, experts, last in ((torch.uint8, 255, 255), (torch.int16, 300, 300), (torch.int64, 8, 2**16 + 3)):
        routes = torch.tensor([[[[0, 1]], [[2, last]], [[7, 7]]]]).to(dtype)  # padding holds anything
        with pytest.raises(ValueError, match="1 of 2 .token, layer. pairs"):
            check_routes(routes, mask, (1, 3, 1, 2), experts)
    check_routes(torch.tensor([[[[0, 1]], [[2, 255]], [[7, 7]]]], dtype=torch.uint8), mask, (1, 3, 1, 2), 256)
