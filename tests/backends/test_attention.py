"""The attention over positions in blocks, in value and gradient, on the backend in use."""

import conformance
import pytest
from backends import test_equations

from keras_medattn.layers import SpatialAttn
from keras_medattn.ops import attention

[ROW] = [row for row in conformance.ROWS if row.layer is SpatialAttn]


@pytest.mark.parametrize("queries", [1, 4, 7])
def test_blocks_equal_the_equation(queries, monkeypatch):
    """The maps of the table have 15 positions, in batches of 3."""
    monkeypatch.setattr(attention, "_WHOLE", 0)
    monkeypatch.setattr(attention, "_HELD", queries * 15 * 3)
    test_equations.test_equation(ROW, "maps", training=False)
    test_equations.test_gradients_equal_central_differences(ROW, "maps", training=False)
