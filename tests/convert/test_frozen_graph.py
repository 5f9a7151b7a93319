"""Frozen TensorFlow graphs: one with the names of the FID network, and graphs that are refused."""

import numpy as np
from tensorboard.compat.proto import graph_pb2, node_def_pb2, tensor_pb2, types_pb2

from diffusion.convert import files, frozen_graph, inception_names
from tests.convert.test_torch_file import refused

NUMBERS = np.array([1.5, -2, 3e5], np.float32)


def constant(name, array, packed=True):
    dtype = {"f": types_pb2.DT_FLOAT, "i": types_pb2.DT_INT32}[array.dtype.kind]
    message = tensor_pb2.TensorProto(dtype=dtype)
    for size in array.shape:
        message.tensor_shape.dim.add(size=size)
    if packed:
        message.tensor_content = array.tobytes()
    else:
        getattr(message, "float_val" if dtype == types_pb2.DT_FLOAT else "int_val").extend(
            array.flat
        )
    node = node_def_pb2.NodeDef(name=name, op="Const")
    node.attr["value"].tensor.CopyFrom(message)
    return node


# Pairs of the conversion that torch-fidelity's weights were made with (its
# utils/util_convert_inception_weights.py): of every kind of block, and of all that is irregular.
PUBLISHED = {
    "conv": "Conv2d_1a_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
    "mixed/conv": "Mixed_5b.branch1x1",
    "mixed/tower/conv_1": "Mixed_5b.branch5x5_2",
    "mixed_1/tower_1/conv_2": "Mixed_5c.branch3x3dbl_3",
    "mixed_2/tower_2/conv": "Mixed_5d.branch_pool",
    "mixed_3/conv": "Mixed_6a.branch3x3",
    "mixed_3/tower/conv": "Mixed_6a.branch3x3dbl_1",
    "mixed_4/tower/conv_2": "Mixed_6b.branch7x7_3",
    "mixed_5/tower_1/conv_4": "Mixed_6c.branch7x7dbl_5",
    "mixed_6/conv": "Mixed_6d.branch1x1",
    "mixed_7/tower_2/conv": "Mixed_6e.branch_pool",
    "mixed_8/tower/conv": "Mixed_7a.branch3x3_1",
    "mixed_8/tower_1/conv_3": "Mixed_7a.branch7x7x3_4",
    "mixed_9/tower/conv": "Mixed_7b.branch3x3_1",
    "mixed_9/tower/mixed/conv": "Mixed_7b.branch3x3_2a",
    "mixed_9/tower/mixed/conv_1": "Mixed_7b.branch3x3_2b",
    "mixed_10/tower_1/conv_1": "Mixed_7c.branch3x3dbl_2",
    "mixed_10/tower_1/mixed/conv": "Mixed_7c.branch3x3dbl_3a",
    "mixed_10/tower_1/mixed/conv_1": "Mixed_7c.branch3x3dbl_3b",
    "mixed_10/tower_2/conv": "Mixed_7c.branch_pool",
}


def test_a_graph_with_the_names_of_the_inception_network(tmp_path):
    """The real graph's names and layouts, small arrays."""
    rng, graph, expected = np.random.RandomState(0), graph_pb2.GraphDef(), {}
    for scope, name in PUBLISHED.items():
        kernel = rng.randn(1, 3, 4, 5).astype(np.float32)
        graph.node.append(constant(f"{scope}/conv2d_params", kernel))
        expected[f"{name}.conv.weight"] = kernel.transpose(3, 2, 0, 1)
        norm = {"beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
        for theirs, word in norm.items():
            expected[f"{name}.bn.{word}"] = rng.randn(5).astype(np.float32)
            graph.node.append(
                constant(f"{scope}/batchnorm/{theirs}", expected[f"{name}.bn.{word}"])
            )
    weights, biases = rng.randn(6, 7).astype(np.float32), rng.randn(7).astype(np.float32)
    graph.node.append(constant("softmax/weights", weights))
    graph.node.append(constant("softmax/biases", biases, packed=False))
    expected |= {"fc.weight": weights.T, "fc.bias": biases}
    graph.node.append(constant("ResizeBilinear/size", np.array([299, 299], np.int32)))
    graph.node.append(node_def_pb2.NodeDef(name="conv", op="Relu"))
    path = tmp_path / "classify_image_graph_def.pb"
    path.write_bytes(graph.SerializeToString())
    arrays = files.inception(str(path))
    scales = {name for name in arrays if name.endswith("bn.weight")}
    assert arrays.keys() - scales == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    for name in scales:  # those are all there: the real graph may leave them out
        np.testing.assert_array_equal(arrays[name], np.ones(inception_names.SHAPES[name]))
    graph.node.append(constant("conv/batchnorm/gamma", np.full(32, 2, np.float32)))
    path.write_bytes(graph.SerializeToString())
    assert files.inception(str(path))["Conv2d_1a_3x3.bn.weight"].sum() == 64


def test_a_constant_s_last_value_stands_for_the_rest(tmp_path):
    node = constant("x", np.array([1, 2], np.float32), packed=False)
    node.attr["value"].tensor.tensor_shape.dim[0].size = 4
    path = tmp_path / "x.pb"
    path.write_bytes(graph_pb2.GraphDef(node=[node]).SerializeToString())
    np.testing.assert_array_equal(frozen_graph.read(path)["x"], [1, 2, 2, 2])


def test_false_graphs_are_refused(tmp_path):
    path = tmp_path / "x.pb"

    def write(*nodes):
        path.write_bytes(graph_pb2.GraphDef(node=nodes).SerializeToString())

    good = constant("x", NUMBERS)
    write(good, good)
    refused(frozen_graph.read, path, "x is there twice")
    write(constant("x", np.array([1, np.inf], np.float32)))
    refused(frozen_graph.read, path, "x holds inf at [1]")
    write(node_def_pb2.NodeDef(name="x", op="Relu"))
    refused(frozen_graph.read, path, "found one without constants")
    bad = constant("x", NUMBERS)
    filled = constant("x", np.array([1], np.float32), packed=False)
    filled.attr["value"].tensor.tensor_shape.dim[0].size = 200
    nodes = [node_def_pb2.NodeDef(name=f"x{i}", op="Const", attr=filled.attr) for i in range(20)]
    write(*nodes)
    refused(frozen_graph.read, path, "its constants take more than")
    lies = {(4,): "expected 4 values for [4], found 3", (-1,): "expected a shape, found none"}
    lies |= {(2**40,): "claims the shape", (0, 2**40): "claims the shape"}
    for sizes, words in lies.items():
        del bad.attr["value"].tensor.tensor_shape.dim[:]
        for size in sizes:
            bad.attr["value"].tensor.tensor_shape.dim.add(size=size)
        write(bad)
        refused(frozen_graph.read, path, words)
    write(good)
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    refused(frozen_graph.read, path, "expected a TensorFlow graph, found another")
