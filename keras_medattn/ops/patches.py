"""The geometry of attention sampling: the overview, the cells of its map, and the patches under them.

Shapes: B images of H x W pixels and C channels, h x w cells of the map, P patches of s x s pixels. A cell is
its flat index, `row * w + column`. A corner is the row and column of a patch's upper left pixel, and may lie
outside the image. An axis of n cells over N pixels has cells of `stride` pixels, or of N / n where no stride
is given. Lengths may be ints or tensors, as long as `2 N n` is below 2^31.
"""

from typing import Any

import keras

ops: Any = keras.ops  # a type checker would infer its types from one backend

_BAND = 2**21  # numbers of a band in float; 8 MiB, which stay in a processor's cache until they are pooled


def overview(image: Any, stride: int, size: Any = None) -> Any:
    """Averages an image over squares of `stride` x `stride` pixels, without overlap.

    `floor(H / stride)` rows and `floor(W / stride)` columns come out; the pixels that are left over fall
    under no cell. An integer image is converted band by band: the whole of it never is in float. LiteRT takes
    that loop at known height and width only: cast the image first to export unknown ones.

    Args:
        image: Tensor `(B, H, W, C)` of any type.
        stride: Pixels along the side of a square.
        size: Integer tensor `(B, 2)`, the rows and columns of each image where the batch is padded to the
            largest. Cells that are not wholly inside their image are 0, whatever the padding holds.

    Returns:
        Tensor `(B, H // stride, W // stride, C)`, in the image's type where that is a float, else float32.

    Raises:
        ValueError: If `image` is not of rank 4, or known to be smaller than a square.

    Example:

    >>> image = ops.cast(ops.reshape(ops.arange(20), (1, 4, 5, 1)), "uint8")
    >>> [float(value) for value in ops.reshape(overview(image, 2), (-1,))]
    [3.0, 5.0, 13.0, 15.0]
    """
    _check_image(image)
    if stride < 1 or any(length is not None and length < stride for length in image.shape[1:3]):
        raise ValueError(
            "`stride` must be at least 1 and at most the image's height and width. "
            f"Received: stride={stride}, image.shape={tuple(image.shape)}"
        )
    if keras.backend.is_float_dtype(image.dtype):
        cells = _average_pool(image, stride)
    else:
        cells = _pool_bands(image, stride)
    if size is None:
        return cells
    mask = cell_mask(size, ops.shape(cells)[1:3], ops.shape(image)[1:3], stride)
    return ops.where(ops.expand_dims(mask, -1), cells, 0)


def cell_mask(
    size: Any, map_size: tuple[Any, Any], image_size: tuple[Any, Any], stride: int | None = None
) -> Any:
    """Which cells of a batch's maps lie wholly inside their images.

    Args:
        size: Integer tensor `(B, 2)`, the rows and columns of each image, which lies in the upper left
            corner.
        map_size: `(h, w)`.
        image_size: `(H, W)` of the padded batch.
        stride: Pixels along a cell's side; by default H / h and W / w.

    Returns:
        Boolean tensor `(B, h, w)`.

    Example:

    >>> mask = cell_mask(ops.convert_to_tensor([[4, 7]]), (3, 3), (6, 9), stride=2)
    >>> [[int(cell) for cell in row] for row in mask[0]]
    [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
    """
    inside = []
    for axis in (0, 1):
        pixels, parts = _cell_side(map_size[axis], image_size[axis], stride)
        ends = (ops.arange(map_size[axis], dtype="int32") + 1) * pixels
        inside.append(ops.expand_dims(ends, 0) <= ops.cast(size[:, axis : axis + 1], "int32") * parts)
    return ops.logical_and(ops.expand_dims(inside[0], 2), ops.expand_dims(inside[1], 1))


def masked_softmax(logits: Any, mask: Any = None) -> Any:
    """The softmax over all cells of each map that count.

    Args:
        logits: Float tensor `(B, h, w)`. What it holds at other cells is not read.
        mask: Boolean tensor `(B, h, w)`, true where a cell counts.

    Returns:
        Float tensor `(B, h, w)`, float32 or better, with sum 1 over each map; 0 at cells that do not count,
        and everywhere where none does.

    Example:

    >>> attention = masked_softmax(ops.zeros((1, 1, 3)), ops.convert_to_tensor([[[True, False, True]]]))
    >>> [float(value) for value in attention[0, 0]]
    [0.5, 0.0, 0.5]
    """
    logits = ops.cast(logits, keras.backend.result_type(logits.dtype, "float32"))
    if mask is None:
        highest = ops.max(logits, axis=(1, 2), keepdims=True)
        weights = ops.exp(logits - ops.stop_gradient(highest))
        return weights / ops.sum(weights, axis=(1, 2), keepdims=True)
    logits = ops.where(mask, logits, 0)
    highest = ops.max(ops.where(mask, logits, -1e30), axis=(1, 2), keepdims=True)
    weights = ops.exp(ops.where(mask, logits - ops.stop_gradient(highest), 0))
    weights = ops.where(mask, weights, 0)
    total = ops.sum(weights, axis=(1, 2), keepdims=True)
    return weights / ops.where(total > 0, total, 1)


def cells_to_corners(
    cells: Any,
    map_size: tuple[Any, Any],
    image_size: tuple[Any, Any],
    patch_size: int,
    stride: int | None = None,
) -> Any:
    """The upper left pixels of patches that are centred on cells.

    The centre of row r lies `(r + 1/2) stride` pixels below the image's edge, so that a patch centred there
    begins `patch_size / 2` pixels higher. Where that is no whole pixel it begins at the nearest one, of two
    the upper; columns likewise.

    Args:
        cells: Integer tensor `(B, P)`.
        map_size: `(h, w)`.
        image_size: `(H, W)`.
        patch_size: s, in pixels.
        stride: Pixels along a cell's side; by default H / h and W / w.

    Returns:
        Int32 tensor `(B, P, 2)`: row and column, negative where the patch begins outside the image.

    Example:

    >>> corners = cells_to_corners(ops.convert_to_tensor([[0, 5]]), (2, 4), (10, 20), patch_size=7, stride=5)
    >>> [[int(place) for place in corner] for corner in corners[0]]
    [[-1, -1], [4, 4]]
    """
    cells = ops.cast(cells, "int32")
    places = []
    for axis, index in enumerate((cells // map_size[1], cells % map_size[1])):
        pixels, parts = _cell_side(map_size[axis], image_size[axis], stride)
        start = (
            (2 * index + 1) * pixels + patch_size * parts + (parts - 1)
        )  # not negative: floors differ there
        places.append(start // (2 * parts) - patch_size)
    return ops.stack(places, axis=-1)


def corners_to_cells(
    corners: Any,
    map_size: tuple[Any, Any],
    image_size: tuple[Any, Any],
    patch_size: int,
    stride: int | None = None,
) -> Any:
    """The cells under the centres of patches: the inverse of `cells_to_corners` for cells of a pixel or more.

    Args:
        corners: Integer tensor `(B, P, 2)`.
        map_size: `(h, w)`.
        image_size: `(H, W)`.
        patch_size: s, in pixels.
        stride: Pixels along a cell's side; by default H / h and W / w.

    Returns:
        Cells `(B, P)` int32; the nearest one where a centre lies under none.

    Example:

    >>> cells = corners_to_cells(ops.convert_to_tensor([[[-1, -1], [4, 4]]]), (2, 4), (10, 20), 7, stride=5)
    >>> [int(cell) for cell in cells[0]]
    [0, 5]
    """
    corners, indices = ops.cast(corners, "int32"), []
    for axis in (0, 1):
        pixels, parts = _cell_side(map_size[axis], image_size[axis], stride)
        centre = ops.maximum(2 * corners[:, :, axis] + patch_size, 0) * parts
        indices.append(ops.minimum(centre // (2 * pixels), map_size[axis] - 1))
    return indices[0] * map_size[1] + indices[1]


def gather_patches(image: Any, corners: Any, patch_size: int, size: Any = None) -> Any:
    """Cuts square patches out of images, which are reflected at their borders.

    Row i of a patch is the image's row `corner + i`, counted back and forth between the first and the last
    row where it lies outside (`numpy.pad`'s mode "reflect": the border row stands once); columns likewise.
    The pixels are gathered by their indices: the image is neither padded nor converted, and padding of a
    batch is not read.

    Args:
        image: Tensor `(B, H, W, C)` of any type, fewer than 2^31 pixels.
        corners: Integer tensor `(B, P, 2)`, rows and columns of the patches' upper left pixels.
        patch_size: s, in pixels.
        size: Integer tensor `(B, 2)`, the rows and columns of each image where the batch is padded to the
            largest.

    Returns:
        Tensor `(B, P, s, s, C)` of the image's type.

    Raises:
        ValueError: If `image` is not of rank 4.

    Example:

    >>> image = ops.cast(ops.reshape(ops.arange(12), (1, 3, 4, 1)), "uint8")
    >>> patch = gather_patches(image, ops.convert_to_tensor([[[-1, 2]]]), 3)
    >>> [[int(value) for value in row] for row in patch[0, 0, :, :, 0]]
    [[6, 7, 6], [2, 3, 2], [6, 7, 6]]
    """
    _check_image(image)
    batch, height, width, channels = ops.shape(image)
    steps = ops.arange(patch_size, dtype="int32")
    places = []
    for axis, length in enumerate((height, width)):
        if size is not None:
            length = ops.reshape(ops.cast(size[:, axis], "int32"), (-1, 1, 1))
        places.append(_reflect(ops.expand_dims(ops.cast(corners[:, :, axis], "int32"), -1) + steps, length))
    rows, columns = places  # (B, P, s)
    rows = rows + ops.reshape(ops.arange(batch, dtype="int32") * height, (-1, 1, 1))
    pixels = ops.expand_dims(rows * width, 3) + ops.expand_dims(columns, 2)  # (B, P, s, s)
    return ops.take(ops.reshape(image, (batch * height * width, channels)), pixels, axis=0)


def _check_image(image: Any) -> None:
    if len(image.shape) != 4:
        raise ValueError(
            f"`image` must have the shape (B, H, W, C). Received: image.shape={tuple(image.shape)}"
        )


def _average_pool(image: Any, stride: int) -> Any:
    return ops.average_pool(image, stride, stride, data_format="channels_last")


def _pool_bands(image: Any, stride: int) -> Any:
    """The average pool of an integer image, band by band of an image's rows."""
    batch, height, width, channels = ops.shape(image)
    rows, columns = height // stride, width // stride
    each = _at_least(_BAND // (stride * width * channels), 1)  # rows of cells in a band
    each = min(each, rows) if isinstance(each, int) and isinstance(rows, int) else ops.minimum(each, rows)
    bands = -(-rows // each)
    each = -(-rows // bands)  # evenly, or the last ones would pool much of each other

    def band(index: Any) -> Any:
        first = ops.minimum(index % bands * each, rows - each) * stride  # the last overlaps the one before
        pixels = ops.slice(image, (index // bands, first, 0, 0), (1, each * stride, width, channels))
        return _average_pool(ops.cast(pixels, "float32"), stride)  # (1, each, w, C)

    cells = ops.map(band, ops.arange(batch * bands, dtype="int32"))
    cells = ops.reshape(cells, (batch, bands * each, columns, channels))
    index = ops.arange(rows, dtype="int32")
    overlap = ops.where(index // each == bands - 1, bands * each - rows, 0)
    return ops.take(cells, index + ops.cast(overlap, "int32"), axis=1)


def _at_least(number: Any, least: int) -> Any:
    return max(number, least) if isinstance(number, int) else ops.maximum(number, least)


def _cell_side(cells: Any, pixels: Any, stride: int | None) -> tuple[Any, Any]:
    """The side of a cell as a fraction: pixels, and into how many parts they are cut."""
    return (pixels, cells) if stride is None else (stride, 1)


def _reflect(places: Any, length: Any) -> Any:
    """Places on an endless axis, counted back and forth on one of `length` pixels."""
    last = ops.cast(ops.maximum(length - 1, 0), places.dtype)
    turned = ops.absolute(places) % ops.cast(ops.maximum(2 * last, 1), places.dtype)
    return ops.minimum(turned, 2 * last - turned)
