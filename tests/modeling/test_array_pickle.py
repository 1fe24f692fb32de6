"""The reader of array pickles: every way in which numpy pickles an array, and no way in which a pickle runs code."""

import os
import pickle
import pickletools
import struct
from collections import OrderedDict

import numpy as np
import pytest

from ssm_vlm.modeling.array_pickle import read_array_pickle

ARRAYS = {
    "float": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "half": np.arange(4, dtype=np.float16),
    "big_endian": np.arange(4, dtype=">i4"),
    "long": np.array(7, dtype=np.int64),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
    "strided": np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2],
    "scalar": np.float32(0.5),
}


def written(tmp_path, contents, protocol=4):
    path = tmp_path / "model.pkl"
    path.write_bytes(contents if isinstance(contents, bytes) else pickle.dumps(contents, protocol=protocol))
    return path


@pytest.mark.parametrize("container", [dict, OrderedDict])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_protocol(tmp_path, protocol, container):
    zoo = {"model": container(ARRAYS), "__author__": "Detectron2 Model Zoo", "matching_heuristics": True}
    for contents in (zoo, container(ARRAYS)):
        read = read_array_pickle(written(tmp_path, contents, protocol))
        assert list(read) == list(ARRAYS)
        for name, array in ARRAYS.items():
            assert read[name].dtype == array.dtype.newbyteorder("=") and np.array_equal(read[name], array)


@pytest.mark.parametrize(("old", "new"), [(b"numpy._core.", b"numpy.core."), (b"numpy.core.", b"numpy._core.")])
def test_names_of_old_and_new_numpy(tmp_path, old, new):
    """In protocol 2 names are lines of text, so that a file of the other numpy is made by replacing them."""
    contents = pickle.dumps({"model": ARRAYS}, protocol=2).replace(old, new)
    assert new + b"multiarray" in contents
    read = read_array_pickle(written(tmp_path, contents))
    assert np.array_equal(read["float"], ARRAYS["float"])


def test_python_2_bytes(tmp_path):
    """Python 2 wrote an array's bytes as an 8-bit string, opcode T."""
    data = np.array([1.5, -2.0], "<f4").tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    dtype = b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01(K\x02t" + dtype + b"\x89T" + struct.pack("<i", len(data)) + data + b"tb"
    read = read_array_pickle(written(tmp_path, b"\x80\x02}U\x01w" + array + state + b"s."))
    assert read["w"].tolist() == [1.5, -2.0]


class Calls:
    """Pickled as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def attacks(marker):
    command = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    return {
        "posix.system": Calls(os.system, command),
        "builtins.exec": Calls(exec, code),
        "builtins.eval": Calls(eval, code),
        "builtins.getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "io.open": Calls(open, str(marker), "w"),
        "numpy.load": f"cnumpy\nload\n(V{marker}\ntR.".encode(),
        "numpy.lib.npyio.load": f"cnumpy.lib.npyio\nload\n(V{marker}\ntR.".encode(),
        "numpy.testing.measure": f"cnumpy.testing\nmeasure\n(V{code}\ntR.".encode(),
        "numpy.testing._private.utils.runstring": (
            f"cnumpy.testing._private.utils\nrunstring\n(V{code}\n(dtR.".encode()
        ),
        "numpy.f2py.crackfortran.myeval": f"cnumpy.f2py.crackfortran\nmyeval\n(V{code}\ntR.".encode(),
        "numpy.memmap": f"cnumpy\nmemmap\n(V{marker}\ntR.".encode(),
        "numpy.vectorize": f"cnumpy\nvectorize\n(cos\nsystem\ntR(V{command}\ntR.".encode(),
        "torch._utils._rebuild_tensor_v2": b"ctorch._utils\n_rebuild_tensor_v2\n(tR.",
        "functools.partial": b"cfunctools\npartial\n(tR.",
        # Protocol 4 names may have dots, to reach through what is admitted.
        "numpy.dtype.__init__.__globals__": b"\x80\x04\x8c\x05numpy\x8c\x1adtype.__init__.__globals__\x93.",
        "collections.abc": b"\x80\x04\x8c\x0bcollections\x8c\x03abc\x93.",
    }


@pytest.mark.parametrize("name", attacks("m"))
@pytest.mark.parametrize("place", ["model", "beside", "alone"])
def test_no_code_runs(tmp_path, name, place):
    marker = tmp_path / "ran"
    attack = attacks(marker)[name]
    if isinstance(attack, bytes):
        contents = attack
    else:
        model = {"model": {"w": ARRAYS["float"], "x": attack}}
        contents = {"model": model, "beside": {"model": {"w": ARRAYS["float"]}, "y": attack}, "alone": attack}[place]
    path = written(tmp_path, contents)
    assert any(opcode.name in ("GLOBAL", "STACK_GLOBAL") for opcode, *_ in pickletools.genops(path.read_bytes()))
    with pytest.raises(ValueError, match=f"it names {name}; only arrays" if "collections" not in name else "it names"):
        read_array_pickle(path)
    assert not marker.exists()


def test_the_attacks_are_real(tmp_path):
    """The mutation twin: with Python's own unpickler the code runs."""
    marker = tmp_path / "ran"
    for name in ("posix.system", "builtins.exec", "numpy.testing._private.utils.runstring"):
        contents = attacks(marker)[name]
        pickle.loads(contents if isinstance(contents, bytes) else pickle.dumps(contents))
        assert marker.exists()
        marker.unlink()


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ({"model": {"w": np.array([{}, []], dtype=object)}}, "an array of Python objects"),
        ({"model": {"w": np.zeros(2, [("a", "f4"), ("b", "i4")])}}, "elements of type 'V8'"),
        ({"model": {"w": np.array(["text"])}}, "elements of type 'U4'"),
        ({"model": {"w": [1.0, 2.0]}}, "'w', which is a list and not an array"),
        ({"model": {3: ARRAYS["float"]}}, "holds 3"),
        ({"model": {}}, "holds no arrays"),
        ([ARRAYS["float"]], "holds no arrays"),
        (b"", "can be read safely"),
        (b"PK\x03\x04 a zip file", "can be read safely"),
        (pickle.dumps({"model": ARRAYS})[:-40], "can be read safely"),
        # An admitted function is given a state: BUILD (b) on numpy.dtype.
        (b"cnumpy\ndtype\n}Vx\nI1\nsb.", "sets the state of a function"),
        # An array that would reach past its bytes.
        (pickle.dumps({"w": np.zeros(3, "u1")}, 2).replace(b"K\x03\x85", b"K\x7f\x85"), "shape (127,) in 3 bytes"),
        # An array that is never given its values.
        (b"}Vw\ncnumpy.core.multiarray\n_reconstruct\n(tRs.", "'w', which is a _Array"),
    ],
)
def test_what_is_no_dict_of_arrays_is_refused(tmp_path, contents, words):
    with pytest.raises(ValueError) as refusal:
        read_array_pickle(written(tmp_path, contents))
    assert words in str(refusal.value) and "model.pkl" in str(refusal.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.pkl"):
        read_array_pickle(tmp_path / "model.pkl")
