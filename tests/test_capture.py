"""What a capture hands over, and what it must not hold on to."""

from __future__ import annotations

import copy
import gc
import weakref

import torch
from torch import nn

from fused_so.capture import Capture


def captured(module):
    calls = []
    return Capture(module, lambda h, g: calls.append((h, g))), calls


def test_rows_of_input_and_output_gradient():
    layer = nn.Linear(3, 2)
    _, calls = captured(layer)
    x = torch.randn(4, 5, 3)
    weights = torch.randn(4, 5, 2)
    (layer(x) * weights).sum().backward()
    (h, g), *rest = calls
    assert not rest
    assert torch.equal(h, x.reshape(20, 3))
    assert torch.equal(g, weights.reshape(20, 2))
    torch.testing.assert_close(g.T @ h, layer.weight.grad)


def test_input_by_keyword_and_a_vector_input():
    layer = nn.Linear(3, 2)
    _, calls = captured(layer)
    x = torch.randn(3)
    layer(input=x).sum().backward()
    assert calls[0][0].shape == (1, 3)
    assert calls[0][1].shape == (1, 2)


def test_only_backward_passes_are_seen_and_only_while_active():
    layer = nn.Linear(3, 2)
    capture, calls = captured(layer)
    layer(torch.randn(4, 3))
    with torch.no_grad():
        layer(torch.randn(4, 3))
    assert not calls
    capture.active = False
    layer(torch.randn(4, 3)).sum().backward()
    assert not calls
    capture.active = True
    layer(torch.randn(4, 3)).sum().backward()
    assert len(calls) == 1
    capture.remove()
    layer(torch.randn(4, 3)).sum().backward()
    assert len(calls) == 1


def test_in_place_activation_after_the_layer():
    layer = nn.Linear(3, 2)
    _, calls = captured(layer)
    x = torch.randn(6, 3)
    nn.ReLU(inplace=True)(layer(x)).sum().backward()
    h, g = calls[0]
    torch.testing.assert_close(g.T @ h, layer.weight.grad)


def test_activations_die_with_the_graph():
    layer = nn.Linear(3, 2)
    capture = Capture(layer, lambda h, g: None)
    x = torch.randn(4, 3).requires_grad_()
    h = x * 2
    alive = weakref.ref(h.untyped_storage())
    output = layer(h)
    del h
    output.sum().backward()
    del output
    gc.collect()
    assert alive() is None
    capture.remove()


def test_copies_of_the_module_are_not_captured():
    layer = nn.Linear(3, 2)
    _, calls = captured(layer)
    copy.deepcopy(layer)(torch.randn(4, 3)).sum().backward()
    assert not calls
