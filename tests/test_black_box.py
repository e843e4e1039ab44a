"""black_box: what fn gets, what comes back, how often it is called, and that nothing is known of its derivative."""

import copy
import inspect
import pickle
import sys
import threading
import types
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from fresh import run_fresh
from helpers import assert_close
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import functorch_inverse as fi
from functorch_inverse import BlackBoxError, NoDerivativeError, StructureError, black_box

Pair = namedtuple("Pair", "a b")
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
INTEGER = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Recorded:
    """A function of arrays that remembers the shapes it was called with."""

    def __init__(self, function=np.sin):
        self.function, self.shapes = function, []

    def __call__(self, *args, **kwargs):
        self.shapes.append(tuple(np.shape(a) for a in args))
        return self.function(*args, **kwargs)


def ramp(*shape, **options):
    options = {"dtype": torch.float64} | options
    return torch.linspace(-0.9, 1.3, int(np.prod(shape)), **options).reshape(shape)


def scaled(a, k=1.0):
    """The arcus sinus hyperbolicus over k."""
    return np.arcsinh(a) / k


# --- what fn gets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATING, *INTEGER], ids=str)
def test_every_dtype(dtype, device):
    x = torch.tensor([0, 1, 1], dtype=dtype, device=device)
    seen = []
    y = black_box(lambda a: seen.append(a) or a)(x)
    assert type(seen[0]) is np.ndarray
    assert seen[0].dtype == (np.float32 if dtype == torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype)
    assert (y.dtype, y.device, y.tolist()) == (dtype, x.device, x.tolist())


LAYOUTS = {
    "transposed": lambda x: x.T,
    "every second": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(4, 3),
    "offset": lambda x: x[1:, 1:],
    "a number": lambda x: x[0, 0],
    "empty": lambda x: x[:0],
    "requires grad": lambda x: x.clone().requires_grad_(),
    "in a graph": lambda x: x.clone().requires_grad_() * 2,
    "parameter": torch.nn.Parameter,
    "inference": lambda x: torch.inference_mode()(x.clone)(),
    "conjugate": lambda x: torch.complex(x, x + 1).conj(),
    "negative bit": lambda x: torch.complex(x, x + 1).conj().imag,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, device):
    x = LAYOUTS[layout](ramp(4, 3, device=device))
    with torch.no_grad():
        torch.testing.assert_close(black_box(lambda a: a * 2)(x), x.detach() * 2)


def test_fn_may_change_what_it_gets():
    x = ramp(3)
    y = black_box(lambda a: np.multiply(a, 2, out=a))(x)
    assert torch.equal(x, ramp(3))
    assert torch.equal(y, 2 * x)


def test_samples_and_shared_tensors_may_be_changed():
    def greedy(a, b):
        a *= 2
        b += a
        return b

    x, b = ramp(4, 3), ramp(3)
    assert torch.equal(vmap(black_box(greedy), (0, None))(x, b), 2 * x + b)
    assert torch.equal(b, ramp(3))


def test_a_buffer_that_fn_uses_again():
    buffer = np.empty(3)
    box = black_box(lambda a: np.sin(a, out=buffer))
    first = box(ramp(3))
    box(ramp(3) + 1)
    assert torch.equal(first, ramp(3).sin())
    assert torch.equal(vmap(box)(ramp(4, 3)), ramp(4, 3).sin())


def test_pytrees_numbers_none_and_strings():
    def fn(d, pair, k, nothing, text, *, flag, more):
        assert nothing is None and text == "text" and flag is True and k == 3 and type(k) is int
        assert type(pair) is Pair and type(d) is OrderedDict
        return {"sum": d["u"] + pair.a * k, "rest": [pair.b + more[0], None, "name", 2.5]}

    x = ramp(3)
    out = black_box(fn)(OrderedDict(u=x), Pair(x + 1, x + 2), 3, None, "text", flag=True, more=(x + 3,))
    assert torch.equal(out["sum"], x + (x + 1) * 3)
    moved, nothing, name, number = out["rest"]
    assert torch.equal(moved, (x + 2) + (x + 3))
    assert (nothing, name) == (None, "name")
    assert number.dtype == torch.float64 and number.item() == 2.5


def test_a_function_without_tensors():
    assert torch.equal(black_box(lambda n: np.arange(n) * 0.5)(3), torch.arange(3, dtype=torch.float64) * 0.5)


def test_numpy_functions_are_called_as_they_are(device):
    x = ramp(3, device=device)
    torch.testing.assert_close(black_box(np.hypot)(x, x + 1), torch.hypot(x, x + 1))


def test_what_fn_closes_over_is_plain():
    w = torch.tensor(2.0, requires_grad=True)
    x = ramp(2, 3)
    for box in (black_box(lambda a: a * w.numpy()), black_box(lambda a: a * w.numpy(), threads=2)):
        torch.testing.assert_close(vmap(box)(x), x * 2)


# --- what comes back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_floating_outputs_take_the_first_floating_inputs_dtype(dtype, device):
    def fn(n, a, b):
        return np.float64(1.5), a.astype(np.float32), np.argmax(a), a > 0, 2.5, 7

    outputs = black_box(fn)(torch.arange(3), ramp(3, dtype=dtype, device=device), ramp(3))
    assert [t.dtype for t in outputs] == [dtype, dtype, torch.int64, torch.bool, dtype, torch.int64]
    assert all(t.device.type == "cpu" for t in outputs)  # the first tensor is


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, torch.complex64), (torch.float64, torch.complex128)], ids=str)
def test_complex_outputs_take_the_precision(dtype, expected):
    assert black_box(lambda a: a + 1j)(ramp(3, dtype=dtype)).dtype == expected
    assert black_box(lambda a: a.real)(ramp(3, dtype=expected)).dtype == dtype


def test_outputs_are_on_the_device_of_the_first_tensor(device):
    outputs = black_box(lambda a, n: (a + 1, n + 1))(ramp(3, device=device), torch.arange(3))
    assert [t.device for t in outputs] == [device, device]


def test_without_floating_input_outputs_keep_their_dtype():
    outputs = black_box(lambda n: (np.sqrt(n), n.astype(np.float32), n > 1))(torch.arange(3))
    assert [t.dtype for t in outputs] == [torch.float64, torch.float32, torch.bool]


ARRAYS = {
    "negative strides": lambda a: a[::-1, ::-1],
    "read-only": lambda a: np.broadcast_to(a[:, :1], (2, 3)),
    "other byte order": lambda a: a.astype(a.dtype.newbyteorder()),
    "Fortran order": np.asfortranarray,
    "a view": lambda a: a[:, 1:],
    "extended precision": lambda a: a.astype(np.longdouble),
    "a NumPy number": np.sum,
    "empty": lambda a: a[:0],
    "a torch tensor": torch.from_numpy,
}


@pytest.mark.parametrize("vmapped", [False, True])
@pytest.mark.parametrize("kind", ARRAYS)
def test_every_kind_of_array(kind, vmapped):
    fn, x = ARRAYS[kind], ramp(2, 3)
    y = vmap(black_box(fn))(x[None])[0] if vmapped else black_box(fn)(x)
    torch.testing.assert_close(y.numpy(), np.asarray(fn(x.numpy().copy()), dtype=np.float64).copy(), rtol=0, atol=0)


def summary(a):
    return {"sum": a.sum(-1, dtype=np.float32), "largest": (np.argmax(a, -1),)}


def summary_result(x):
    batch = x.shape[:-1]
    return {"sum": x.new_empty(batch, dtype=torch.float32), "largest": (x.new_empty(batch, dtype=torch.int64),)}


@pytest.mark.parametrize("vmapped", [False, True])
def test_the_dtypes_of_result_win(vmapped):
    box = black_box(summary, result=summary_result)
    y = vmap(box)(ramp(4, 3)) if vmapped else box(ramp(4, 3))
    assert y["sum"].dtype == torch.float32 and y["largest"][0].dtype == torch.int64
    torch.testing.assert_close(y["sum"], ramp(4, 3).sum(-1).float())


def test_result_sees_shapes_dtypes_and_device_of_the_call(device):
    seen = []

    def result(x, n, *, k):
        seen.append((x.shape, x.dtype, x.device, x.requires_grad, n, k))
        return x

    x = ramp(2, 3, dtype=torch.float32, device=device).requires_grad_()
    black_box(lambda a, n, *, k: a * n, result=result)(x, 2, k="k")
    assert seen == [(torch.Size([2, 3]), torch.float32, device, False, 2, "k")]


# --- vmap: how many calls, and of what ------------------------------------------------------------------

NESTED = {
    "one level": (lambda box: vmap(box), (4, 3)),
    "another dim": (lambda box: vmap(box, in_dims=1, out_dims=1), (3, 4)),
    "two levels": (lambda box: vmap(vmap(box)), (2, 4, 3)),
    "two levels, swapped": (lambda box: vmap(vmap(box, 0), 1, 1), (4, 2, 3)),
    "three levels": (lambda box: vmap(vmap(vmap(box))), (2, 1, 4, 3)),
    "chunks": (lambda box: vmap(box, chunk_size=4), (4, 3)),
    "random": (lambda box: vmap(box, randomness="different"), (4, 3)),
}


@pytest.mark.parametrize("method", ["sequential", "broadcast"])
@pytest.mark.parametrize("nested", NESTED)
def test_calls(nested, method, device):
    batched, shape = NESTED[nested]
    fn, x = Recorded(), ramp(*shape, device=device)
    torch.testing.assert_close(batched(black_box(fn, vmap_method=method))(x), torch.sin(x))
    samples = x.numel() // 3
    assert len(fn.shapes) == (samples if method == "sequential" else 1)
    assert {len(seen[0]) for seen in fn.shapes} == {1 if method == "sequential" else x.ndim}


@pytest.mark.parametrize(
    ("method", "shapes"),
    [("sequential", [((3,), ())] * 8), ("broadcast", [((2, 4, 3), (2, 4))])],
)
def test_calls_where_each_level_batches_another_tensor(method, shapes):
    def fn(a, k):
        return a * k[..., None]

    recorded, x, k = Recorded(fn), ramp(4, 3), ramp(2)
    box = black_box(recorded, vmap_method=method)
    y = vmap(vmap(box, (0, None)), (None, 0))(x, k)
    torch.testing.assert_close(y, x * k[:, None, None])
    assert recorded.shapes == shapes


@pytest.mark.parametrize("method", ["sequential", "broadcast"])
def test_pytrees_under_vmap(method):
    def fn(d, n, *, k):
        return {"u": d["a"] * k, "v": (d["b"] + n[..., None],)}

    d, n, k = {"a": ramp(4, 3), "b": ramp(2)}, torch.arange(4), ramp(4, 3) + 1
    box = black_box(fn, vmap_method=method)
    y = vmap(lambda a, n, k: box({"a": a, "b": d["b"]}, n, k=k))(d["a"], n, k)
    torch.testing.assert_close(y, {"u": d["a"] * k, "v": (d["b"] + n[:, None],)})


def test_threads_run_at_the_same_time_and_keep_the_order():
    together = threading.Barrier(3, timeout=30)

    def fn(a):
        together.wait()  # for two more calls of fn
        return a * 2

    x = ramp(2, 3, 5)
    assert torch.equal(vmap(vmap(black_box(fn, threads=3)))(x), 2 * x)


def test_threads_name_the_sample():
    with pytest.raises(BlackBoxError, match=r"sample \(1, 2\)"):
        vmap(vmap(black_box(only_below_five, threads=2)))(one_that_is_nine())


def fake_tqdm(monkeypatch):
    bars = []

    def tqdm(rows, total, desc):
        bars.append([total, desc, 0])
        for row in rows:
            bars[-1][2] += 1
            yield row

    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=tqdm))
    return bars


@pytest.mark.parametrize("threads", [None, 2])
def test_progress(monkeypatch, threads):
    bars = fake_tqdm(monkeypatch)
    box = black_box(np.sin, progress=True, threads=threads)
    torch.testing.assert_close(vmap(vmap(box))(ramp(2, 3, 5)), ramp(2, 3, 5).sin())
    assert bars == [[6, "black_box", 6]]


def test_progress_is_for_batches(monkeypatch):
    bars = fake_tqdm(monkeypatch)
    black_box(np.sin, progress=True)(ramp(3))
    vmap(black_box(np.sin, progress=True, vmap_method="broadcast"))(ramp(3))
    assert bars == []


def test_progress_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        vmap(black_box(np.sin, progress=True))(ramp(3))


# --- the object -----------------------------------------------------------------------------------------


def test_name_doc_and_signature():
    box = black_box(scaled)
    assert (box.__name__, box.__doc__, repr(box)) == ("scaled", scaled.__doc__, "black_box(scaled)")
    assert inspect.signature(box) == inspect.signature(scaled)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda box: pickle.loads(pickle.dumps(box))])
def test_copies(copied):
    box = copied(black_box(scaled, vmap_method="broadcast"))
    torch.testing.assert_close(vmap(box, (0, None))(ramp(4, 3), 2.0), torch.asinh(ramp(4, 3)) / 2)


# --- no derivative --------------------------------------------------------------------------------------

WAYS = ("custom_inverse", "custom_root", "custom_fixed_point", "custom_jacobian", "finite_difference")


def dual(box, x):
    with forward_ad.dual_level():
        return box(forward_ad.make_dual(x, x))


DERIVATIVES = {
    "backward": lambda box, x: box(x.requires_grad_()).sum().backward(),
    "grad": lambda box, x: grad(lambda x: box(x).sum())(x),
    "vjp": lambda box, x: vjp(box, x)[1](x),
    "jvp": lambda box, x: jvp(box, (x,), (x,)),
    "jacrev": lambda box, x: jacrev(box)(x),
    "jacfwd": lambda box, x: jacfwd(box)(x),
    "hessian": lambda box, x: hessian(lambda x: box(x).sum())(x),
    "vmap(grad)": lambda box, x: vmap(grad(box))(x),
    "grad(vmap)": lambda box, x: grad(lambda x: vmap(box)(x).sum())(x),
    "vmap(jacfwd)": lambda box, x: vmap(jacfwd(box))(x),
    "dual numbers": dual,
    "keyword": lambda box, x: grad(lambda k: box(x, k=k).sum())(x),
    "one of two": lambda box, x: grad(lambda k: box(x, k).sum())(x),
    "in a tree": lambda box, x: grad(lambda x: black_box(lambda d: d["a"])({"a": x}).sum())(x),
    "in f": lambda box, x: fi.custom_inverse(np_sinh, box, event_dim=0)(x.requires_grad_()).sum().backward(),
}


def np_sinh(x):
    return np.sinh(x.numpy())


@pytest.mark.parametrize("method", ["sequential", "broadcast"])
@pytest.mark.parametrize("mode", DERIVATIVES)
def test_a_bare_derivative_is_refused(mode, method):
    with pytest.raises(NoDerivativeError) as error:
        DERIVATIVES[mode](black_box(scaled, vmap_method=method), ramp(3))
    assert all(way in str(error.value) for way in WAYS)


def test_values_of_live_tensors_and_derivatives_beside_them():
    x, box = ramp(3), black_box(scaled)
    assert_close(grad(lambda x: (box(x.detach()) * x).sum())(x), torch.asinh(x))
    assert torch.equal(box(x.clone().requires_grad_()).detach(), torch.asinh(x))
    with torch.no_grad():
        assert not box(x.requires_grad_()).requires_grad
    assert not black_box(np.argmax)(x.requires_grad_()).requires_grad


# --- with a derivative ------------------------------------------------------------------------------------


def rules(method):
    return {
        "custom_inverse": fi.custom_inverse(black_box(np.arcsinh, vmap_method=method), torch.sinh, event_dim=0),
        "custom_jacobian": fi.custom_jacobian(black_box(np.arcsinh, vmap_method=method), slope, event_dim=0),
        "finite_difference": fi.finite_difference(black_box(np.arcsinh, vmap_method=method), order=6, event_dim=0),
        "one sample": fi.custom_inverse(black_box(np.arcsinh, vmap_method=method), torch.sinh),
    }


def slope(x):
    return 1 / (1 + x**2).sqrt()


STACKS = {
    "backward": lambda h, x: torch.autograd.grad(h(x := x.clone().requires_grad_()).sin().sum(), x)[0],
    "grad": lambda h, x: grad(lambda x: h(x).sin().sum())(x),
    "vmap(grad)": lambda h, x: vmap(grad(lambda x: h(x).sin().sum()))(x[:, None]),
    "jvp": lambda h, x: jvp(h, (x,), (x + 1,)),
    "jacrev": lambda h, x: jacrev(h)(x),
    "jacfwd": lambda h, x: jacfwd(h)(x),
    "hessian": lambda h, x: hessian(lambda x: h(x).sin().sum())(x),
}


@pytest.mark.parametrize("method", ["sequential", "broadcast"])
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("rule", rules("sequential"))
def test_inside_a_rule(rule, stack, method):
    h, transform = rules(method)[rule], STACKS[stack]
    tolerance = 1e-7 if rule == "finite_difference" else 1e-9
    assert_close(transform(h, ramp(3)), transform(torch.asinh, ramp(3)), tolerance)


@pytest.mark.parametrize(("method", "calls"), [("sequential", 4), ("broadcast", 1)])
def test_calls_inside_a_rule(method, calls):
    fn = Recorded(np.arcsinh)
    h = fi.custom_inverse(black_box(fn, vmap_method=method), torch.sinh, vmap_method="vmap")
    vmap(hessian(lambda x: h(x).sum()))(ramp(4, 3))
    assert len(fn.shapes) == calls


# --- what is refused --------------------------------------------------------------------------------------


def only_below_five(a):
    if np.any(a > 5):
        raise ValueError("too large")
    return a


def one_that_is_nine():
    x = torch.zeros(2, 3, 1)
    x[1, 2] = 9
    return x


def test_the_error_of_one_sample():
    x = one_that_is_nine()
    with pytest.raises(BlackBoxError, match=r"in sample \(1, 2\) .* ValueError: too large") as error:
        vmap(vmap(black_box(only_below_five)))(x)
    assert isinstance(error.value.__cause__, ValueError)
    with pytest.raises(BlackBoxError, match="in sample 2 of"):
        vmap(black_box(only_below_five))(x[1])
    with pytest.raises(ValueError, match="too large"):
        black_box(only_below_five)(x)


VARYING = {
    "shape": lambda a: np.zeros(1 + (a > 1)),
    "number of dims": lambda a: np.zeros((3,) * (1 + (a > 1))),
    "structure": lambda a: (a, a) if a > 1 else a,
    "keys": lambda a: {"u": a} if a > 1 else {"v": a},
}


@pytest.mark.parametrize("what", VARYING)
def test_another_output_for_another_sample(what):
    with pytest.raises(StructureError, match="sample 2"):
        vmap(black_box(VARYING[what]))(torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("fn", [np.sum, lambda a: a.sum(0), lambda a: a[:1], lambda a: (a, 3.0)])
def test_broadcast_needs_the_batch_dim_in_every_output(fn):
    with pytest.raises(StructureError, match="2"):
        vmap(black_box(fn, vmap_method="broadcast"))(ramp(2, 3))


RESULTS = {
    "shape": (lambda x: x[:2], r"returned shape \(3,\) where `result` says \(2,\)"),
    "structure": (lambda x: (x, x), "compared with `result`"),
    "keys": (lambda x: {"u": x}, "compared with `result`"),
    "number": (lambda x: 3.0, "returned"),
}


@pytest.mark.parametrize("vmapped", [False, True])
@pytest.mark.parametrize("what", RESULTS)
def test_wrong_result(what, vmapped):
    result, text = RESULTS[what]
    box = black_box(np.sin, result=result)
    with pytest.raises(StructureError, match=text):
        vmap(box)(ramp(4, 3)) if vmapped else box(ramp(3))


@pytest.mark.parametrize(("method", "text"), [("vmap", "cannot enter NumPy"), ("parallel", "choose"), (None, "choose")])
def test_unknown_vmap_method(method, text):
    with pytest.raises(ValueError, match=text) as error:
        black_box(np.sin, vmap_method=method)
    assert "'sequential'" in str(error.value) and "'broadcast'" in str(error.value)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"fn": 3}, TypeError, "`fn` is 3"),
        ({"fn": np.sin, "result": 3}, TypeError, "`result` is 3"),
        ({"fn": np.sin, "threads": 0}, ValueError, "threads=0; choose"),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=text):
        black_box(**options)


@pytest.mark.parametrize("value", [None, "text", {}, ()])
def test_fn_that_returns_nothing(value):
    with pytest.raises(StructureError, match="without any tensor or array"):
        black_box(lambda a: value)(ramp(3))


def test_an_empty_batch():
    assert vmap(black_box(np.sin, vmap_method="broadcast"))(ramp(0, 3)).shape == (0, 3)
    with pytest.raises(StructureError, match="empty batch needs a call"):
        vmap(black_box(np.sin))(ramp(0, 3))


# --- torch.compile ------------------------------------------------------------------------------------------
# Boxes are module globals: a black box is made outside of what is compiled.

LOOPED = black_box(scaled)
BROADCAST = black_box(scaled, vmap_method="broadcast")
SUMMARY = black_box(summary, result=summary_result)
SELFISH = black_box(lambda a: np.multiply(a, 2, out=a))
BOXES = [black_box(np.sin), black_box(np.cos), black_box(np.exp)]


def trees(d, pair, nothing=None, text="", *, scale):
    assert nothing is None and text == "it's\n...", text
    return d["a"] * pair[0] + d["b"][0] * scale


TREES = black_box(trees)
INVERSES = {"sequential": LOOPED, "broadcast": BROADCAST}


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def compiled_values():
    x = ramp(4, 3)
    assert_close(compiled(lambda x: LOOPED(x) * 2)(x), torch.asinh(x) * 2)
    assert_close(compiled(LOOPED)(x.float()), torch.asinh(x).float(), 1e-6)
    assert_close(compiled(lambda x: LOOPED(x.T[1:], 4) + LOOPED(x.T[1:], k=4.0))(x), torch.asinh(x.T[1:]) / 2)
    assert_close(compiled(SUMMARY)(x), SUMMARY(x))
    assert_close(compiled(vmap(SUMMARY, out_dims=0))(x)["sum"], SUMMARY(x)["sum"])
    again = (x + 1, [x + 2])
    got = compiled(lambda x, p: TREES({"a": x, "b": [x]}, p, None, "it's\n...", scale=p[1][0]))(x, again)
    assert_close(got, x * (x + 1) + x * (x + 2))
    assert_close((compiled(SELFISH)(x), x), (ramp(4, 3) * 2, ramp(4, 3)))


def compiled_calls():
    """The first level batches both, the second x alone; then each level batches another one."""
    x, k = ramp(2, 4, 3), ramp(2)
    for method, calls in (("sequential", 8), ("broadcast", 1)):
        fn = Recorded(lambda a, k: a * np.reshape(k, (*np.shape(k), *(1,) * (a.ndim - np.ndim(k)))))
        box = black_box(fn, vmap_method=method)
        assert_close(compiled(vmap(vmap(box, (0, None))))(x, k), x * k[:, None, None])
        assert len(fn.shapes) == calls
        assert_close(compiled(vmap(vmap(box, (0, None)), (None, 0)))(x[0], k), x[:1] * k[:, None, None])
        assert len(fn.shapes) == 2 * calls
        assert_close(compiled(vmap(box, (1, None), 1))(x[0], k[1]), x[0] * k[1])


def compiled_inside_a_rule(method, *stacks):
    x, h = ramp(3), fi.custom_inverse(INVERSES[method], torch.sinh, event_dim=0)
    for stack in (STACKS[name] for name in stacks):
        assert_close(compiled(lambda x: stack(h, x))(x), stack(torch.asinh, x))  # noqa: B023


def compiled_backward_inside_a_rule():
    x = ramp(3).requires_grad_()
    for rule in (fi.custom_inverse(LOOPED, torch.sinh, event_dim=0), fi.custom_jacobian(LOOPED, slope, event_dim=0)):
        assert_close(torch.autograd.grad(compiled(rule)(x).sum(), x), (slope(x.detach()),))


def compiled_forward_mode_is_nan():
    x = ramp(3)
    assert compiled(lambda x: jvp(LOOPED, (x,), (x,))[1])(x).isnan().all()
    assert compiled(jacfwd(LOOPED))(x).isnan().all()
    assert compiled(vmap(jacfwd(BROADCAST)))(x).isnan().all()
    assert_close(compiled(lambda x: jvp(lambda x: LOOPED(x.detach()) * x, (x,), (x,))[1])(x), torch.asinh(x) * x)


def compiled_backward_is_refused():
    with pytest.raises(Exception, match="black_box"):
        compiled(LOOPED)(ramp(3).requires_grad_()).sum().backward()


def compiled_grad_is_refused():
    with pytest.raises(Exception, match="black_box"):
        compiled(grad(lambda x: LOOPED(x).sum()))(ramp(3))


def compiled_sizes():
    for call in (LOOPED, vmap(LOOPED), vmap(BROADCAST), vmap(lambda x: LOOPED(x, x.shape[0]))):
        function = compiled(call)
        for n in (2, 3, 5, 8):
            assert_close(function(ramp(n, n)), call(ramp(n, n)))


def compiled_with_symbolic_sizes():
    function = compiled(LOOPED, dynamic=True)
    for n in (2, 3, 5):
        assert_close(function(ramp(n)), torch.asinh(ramp(n)))


def compiled_several_boxes():
    function, x = compiled(lambda box, x: box(x)), ramp(3)
    assert_close([function(box, x) for box in BOXES], [x.sin(), x.cos(), x.exp()])


def compiled_numbers_that_change():
    function, x = compiled(lambda x, k: LOOPED(x, k)), ramp(3)
    for k in (1.0, 2.5, 3.5, 7, 8, float("inf")):
        torch.testing.assert_close(function(x, k), torch.asinh(x) / k)


def compiled_shapes_that_result_does_not_tell():
    box = black_box(np.sum)
    with pytest.raises(StructureError, match="without `result` one output like the first tensor is assumed"):
        compiled(lambda x: box(x))(ramp(3))


def compiled_wrong_result():
    box = black_box(np.sum, result=lambda x: x)
    with pytest.raises(StructureError, match="`result` says"):
        compiled(lambda x: box(x))(ramp(3))


def compiled_error_of_one_sample():
    box = black_box(only_below_five)
    with pytest.raises(BlackBoxError, match=r"in sample \(1, 2\) .* ValueError: too large"):
        compiled(vmap(vmap(box)))(one_that_is_nine())


def compiled_leaf_that_cannot_be_handed_over():
    box = black_box(lambda a, what: a)
    with pytest.raises(Exception, match=r"torch\.compile cannot hand slice to the function"):
        compiled(lambda x: box(x, slice(2)))(ramp(3))


def compiled_namedtuple():
    """As in eager, or refused: never another type."""
    box = black_box(lambda pair: pair.a * pair.b)
    try:
        y = compiled(lambda x: box(Pair(x, x)))(ramp(3))
    except Exception as error:
        assert "torch.compile cannot hand Pair to the function" in str(error), error
    else:
        assert_close(y, ramp(3) ** 2)


def compiled_making_one_inside():
    with pytest.raises(Exception, match="make the black box outside the compiled region"):
        compiled(lambda x: black_box(np.sin)(x))(ramp(3))


TOGETHER = {
    "values": (compiled_values, compiled_sizes, compiled_with_symbolic_sizes),
    "calls": (compiled_calls, compiled_several_boxes, compiled_numbers_that_change),
    "refused": (
        compiled_shapes_that_result_does_not_tell,
        compiled_wrong_result,
        compiled_error_of_one_sample,
        compiled_leaf_that_cannot_be_handed_over,
        compiled_namedtuple,
        compiled_making_one_inside,
    ),
    "backward": (compiled_forward_mode_is_nan, compiled_backward_inside_a_rule, compiled_backward_is_refused),
    "grad": (compiled_grad_is_refused,),
}


def together(name):
    """Tests in one process; only the last trace of torch.func may fail."""
    for test in TOGETHER[name]:
        test()


@pytest.mark.parametrize("name", TOGETHER)
def test_compile(name):
    run_fresh(together, name)


@pytest.mark.parametrize(
    ("method", "stacks"),
    [("sequential", ("grad", "vmap(grad)", "jvp")), ("broadcast", ("jacrev", "jacfwd", "vmap(grad)", "hessian"))],
    ids=["sequential", "broadcast"],
)
def test_compile_inside_a_rule(method, stacks):
    run_fresh(compiled_inside_a_rule, method, *stacks)
