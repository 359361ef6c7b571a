import array
import json
import os
import pathlib
import unittest

from support import Case, needs_numpy, needs_torch

from everlit import safetensors
from everlit.safetensors import BadSafetensors, Buffer


class SafetensorsTest(Case):
    def round_trip(self, values):
        leaves = {name: safetensors.leaf(value) for name, value in values.items()}
        path = self.path("file.safetensors")
        os.close(safetensors.write(path, leaves))
        with open(path, "rb") as file:
            tensors, notes = safetensors.read(bytearray(file.read()))
        return {name: safetensors.restore(tensors[name], leaves[name].form) for name in values}, notes

    def test_plain_buffers_come_back(self):
        values = {
            "floats": array.array("f", [1.5, -2.0]),
            "bytes": b"\0\1\2",
            "changing": bytearray(b"xyz"),
            "none": b"",
            "halves": Buffer("BF16", (2, 1), memoryview(b"abcd")),
            "number": Buffer("F64", (), memoryview(b"12345678")),
            "view": memoryview(array.array("q", range(6))).cast("B").cast("q", (2, 3)),
        }
        back, notes = self.round_trip(values)
        self.assertEqual(back["floats"], Buffer("F32", (2,), memoryview(values["floats"]).cast("B")))
        self.assertEqual((back["bytes"], back["changing"], back["none"]), (b"\0\1\2", bytearray(b"xyz"), b""))
        self.assertEqual((back["halves"], back["number"]), (values["halves"], values["number"]))
        self.assertEqual((back["view"].dtype, back["view"].shape, bytes(back["view"].data)), ("I64", (2, 3), bytes(values["view"])))
        self.assertEqual(notes, {"format": "mixed"})

    def test_every_tensor_is_aligned(self):
        leaves = {"a": safetensors.leaf(b"123"), "b": safetensors.leaf(array.array("d", [1.0])), "c": safetensors.leaf(array.array("h", [1]))}
        path = self.path("file")
        os.close(safetensors.write(path, leaves))
        content = pathlib.Path(path).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        self.assertEqual(length % 8, 0)
        self.assertEqual([header[name]["data_offsets"][0] for name in "bca"], [0, 8, 10])

    def test_what_is_no_tensor_says_so(self):
        self.assertIsNone(safetensors.leaf("text"))
        with self.assertRaisesRegex(TypeError, "12 bytes is not F32"):
            safetensors.leaf(Buffer("F32", (2,), memoryview(b"x" * 12)))

    def test_malformed_files_are_refused(self):
        def file(header, data=b""):
            text = header if isinstance(header, bytes) else json.dumps(header).encode()
            return bytearray(len(text).to_bytes(8, "little") + text + data)

        one = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
        self.assertEqual(list(safetensors.read(file({"a": one}, b"xx"))[0]), ["a"])
        for bad in [
            bytearray(b"short"),
            bytearray(b"\xff" * 16),
            file(b"{"),
            file(b"[]"),
            file(b"[" * 50_000),
            file({"a": {**one, "dtype": "F12"}}, b"xx"),
            file({"a": {**one, "shape": [3]}}, b"xx"),
            file({"a": {**one, "shape": [-2]}}, b"xx"),
            file({"a": {**one, "shape": [True, 2]}}, b"xx"),
            file({"a": {**one, "data_offsets": [2, 0]}}, b"xx"),
            file({"a": {**one, "data_offsets": [0, 3]}}, b"xx"),
            file({"a": one}, b"xxx"),
            file({"a": one}, b"x"),
            file({"a": one, "b": one}, b"xx"),
            file({"a": one, "b": {**one, "data_offsets": [3, 5]}}, b"xxxxx"),
            file({"a": 7}, b"xx"),
        ]:
            with self.assertRaises(BadSafetensors, msg=bytes(bad[:80])):
                safetensors.read(bad)

    def test_shares_are_even_and_those_of_the_rust_program(self):
        self.assertEqual(safetensors.share_out([5, 90, 10, 40, 50, 5], 2), [1, 0, 0, 1, 1, 1])
        self.assertEqual(safetensors.share_out([1], 4), [0])
        self.assertEqual(safetensors.share_out([], 4), [])

    @needs_numpy
    def test_numpy_arrays_come_back(self):
        import numpy

        kinds = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool", "complex64"]
        values = {kind: numpy.arange(6).reshape(2, 3).astype(kind) for kind in kinds}
        values.update(zero=numpy.zeros((0, 3)), point=numpy.array(7, numpy.int32), turned=numpy.arange(6.0).reshape(2, 3).T)
        values.update(big=numpy.arange(3, dtype=">i4"), scalar=numpy.float32(2.5))
        back, _ = self.round_trip(values)
        for name, value in values.items():
            self.assertEqual((back[name].shape, back[name].tolist()), (value.shape, value.tolist()), name)
            self.assertEqual(back[name].dtype, value.dtype.newbyteorder("="), name)
        self.assertIsInstance(back["scalar"], numpy.float32)
        back["float32"][0, 0] = 9
        with self.assertRaises(TypeError):
            safetensors.leaf(numpy.array([object()]))

    @needs_torch
    def test_torch_tensors_come_back(self):
        import torch

        kinds = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "uint16", "float8_e4m3fn"]
        values = {kind: torch.arange(6).reshape(2, 3).to(getattr(torch, kind)) for kind in kinds if hasattr(torch, kind)}
        values.update(zero=torch.zeros(0, 3), point=torch.tensor(7), turned=torch.arange(6.0).reshape(2, 3).T, conj=torch.tensor([1 + 2j], dtype=torch.complex64).conj())
        values.update(grad=torch.nn.Parameter(torch.ones(2)), part=torch.arange(10)[3:7])
        back, notes = self.round_trip(values)
        for name, value in values.items():
            self.assertEqual((back[name].dtype, back[name].shape), (value.dtype, value.shape), name)
            self.assertTrue(torch.equal(back[name].to(torch.complex64), value.detach().to(torch.complex64)), name)
        self.assertEqual(notes, {"format": "pt"})
        back["float32"][0, 0] = 9
        for bad in (torch.ones(2).to_sparse(), torch.empty(1, device="meta")):
            with self.assertRaises(TypeError):
                safetensors.leaf(bad)

    @needs_torch
    def test_tensors_of_other_writers_may_be_unaligned(self):
        import torch

        header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}} '
        content = bytearray(len(header).to_bytes(8, "little") + header + b"\0\0\x80\x3f")
        self.assertTrue(torch.equal(safetensors.restore(safetensors.read(content)[0]["a"], "pt"), torch.ones(1)))


if __name__ == "__main__":
    unittest.main()
