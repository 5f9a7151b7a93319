"""Reads the constants of a frozen TensorFlow graph (.pb) without TensorFlow.

The message types are those of the `tensorboard` package. Written for `classify_image_graph_def.pb`
of 2015-12-05 (http://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz), the
original of the FID network. That file was not available: names and layouts are as others publish
them, and the tests read a graph built accordingly.
"""

import os
import pathlib

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto import graph_pb2, tensor_pb2, types_pb2

from diffusion.convert.validation import check_finite, check_shape, integrity_errors

MAX_BYTES = 2**30  # a message is parsed as a whole
# TensorFlow's type -> NumPy's, and the field of values that are not packed into tensor_content.
DTYPES = {
    types_pb2.DT_FLOAT: ("<f4", "float_val"),
    types_pb2.DT_DOUBLE: ("<f8", "double_val"),
    types_pb2.DT_INT32: ("<i4", "int_val"),
    types_pb2.DT_INT64: ("<i8", "int64_val"),
}


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns {name of the node: array} of a graph's numeric constants.

    Raises IntegrityError for another file, and for constants that hold NaN, the same name twice,
    another number of values than their shape has, or together twice the file's size.
    """
    with integrity_errors(path):
        path = pathlib.Path(path)
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"expected a graph of at most {MAX_BYTES:,} bytes, found {size:,}")
        graph = graph_pb2.GraphDef()
        try:
            graph.ParseFromString(path.read_bytes())
        except DecodeError as error:
            raise ValueError("expected a TensorFlow graph, found another or a cut file") from error
        arrays, total = {}, 0
        for node in graph.node:
            if node.op != "Const" or node.attr["value"].tensor.dtype not in DTYPES:
                continue
            if node.name in arrays:
                raise ValueError(f"{node.name} is there twice")
            arrays[node.name] = _to_array(node.name, node.attr["value"].tensor, size)
            total += arrays[node.name].nbytes
            if total > 2 * size:  # one value may stand for a whole array
                raise ValueError(f"its constants take more than {2 * size:,} bytes")
        if not arrays:
            raise ValueError("expected a frozen TensorFlow graph, found one without constants")
        return arrays


def _to_array(name: str, tensor: tensor_pb2.TensorProto, file_size: int) -> np.ndarray:
    dtype, field = np.dtype(DTYPES[tensor.dtype][0]), DTYPES[tensor.dtype][1]
    shape = [int(axis.size) for axis in tensor.tensor_shape.dim]
    check_shape(name, shape, max(1, file_size // dtype.itemsize))
    n = int(np.prod(shape, dtype=np.int64))
    if tensor.tensor_content and len(tensor.tensor_content) % dtype.itemsize == 0:
        values = np.frombuffer(tensor.tensor_content, dtype)
    else:
        values = np.asarray(getattr(tensor, field), dtype)
        if 0 < len(values) < n:  # the last value stands for the rest
            values = np.append(values, np.full(n - len(values), values[-1]))
    if len(values) != n:
        raise ValueError(f"{name}: expected {n} values for {shape}, found {len(values)}")
    return check_finite(name, values.reshape(shape))
