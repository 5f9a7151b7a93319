"""Frozen TensorFlow graphs (.pb): the arrays of their constants, without TensorFlow.

The messages are those of the `tensorboard` package. Written for `classify_image_graph_def.pb` of
2015-12-05 (http://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz), the
original of the FID network. That file itself was not at hand: names and layouts are as others
publish them, and the tests read a graph built to them.
"""

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto import graph_pb2, tensor_pb2, types_pb2

from diffusion.convert.validation import covered, finite
from diffusion.utils.errors import IntegrityError

# TensorFlow's type -> NumPy's, and the field that holds values not packed into tensor_content.
DTYPES = {
    types_pb2.DT_FLOAT: ("<f4", "float_val"),
    types_pb2.DT_DOUBLE: ("<f8", "double_val"),
    types_pb2.DT_INT32: ("<i4", "int_val"),
    types_pb2.DT_INT64: ("<i8", "int64_val"),
}


def read(data: bytes) -> dict[str, np.ndarray]:
    """The numbers among a graph's constants: {name of the node: array}.

    Raises WeightsError for what is not a graph, and for constants that hold fewer or more values
    than their shapes say, NaN, or the same name twice. Constants of other types, such as strings,
    are left out.
    """
    graph = graph_pb2.GraphDef()
    try:
        graph.ParseFromString(data)
    except DecodeError as error:
        raise IntegrityError("expected a TensorFlow graph, found another or a part of one") from error
    arrays = {}
    for node in graph.node:
        if node.op != "Const" or node.attr["value"].tensor.dtype not in DTYPES:
            continue
        if node.name in arrays:
            raise IntegrityError(f"{node.name} is there twice")
        arrays[node.name] = finite(node.name, _array(node.name, node.attr["value"].tensor, data))
    if not arrays:
        raise IntegrityError("expected a frozen TensorFlow graph, found one without constants")
    return arrays


def _array(name: str, tensor: tensor_pb2.TensorProto, data: bytes) -> np.ndarray:
    """Its values lie in tensor_content, or in a list whose last one stands for all that follow."""
    dtype, field = np.dtype(DTYPES[tensor.dtype][0]), DTYPES[tensor.dtype][1]
    shape = [int(axis.size) for axis in tensor.tensor_shape.dim]
    covered(name, shape, max(1, len(data) // dtype.itemsize))
    n = int(np.prod(shape, dtype=np.int64))
    content = tensor.tensor_content
    if content and len(content) % dtype.itemsize == 0:
        values = np.frombuffer(content, dtype)
    else:
        values = np.asarray(getattr(tensor, field), dtype)
        if 0 < len(values) < n:
            values = np.append(values, np.full(n - len(values), values[-1]))
    if len(values) != n:
        raise IntegrityError(f"{name}: expected {n} values for {shape}, found {len(values)}")
    return values.reshape(shape)
