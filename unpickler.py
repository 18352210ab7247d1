"""A stranger's pickle in, containers, numbers, texts and tensors out; nothing else is made, and nothing is called.

A pickle is a program for a small stack machine, which may import and call any function in Python. The machine here
knows the opcodes that build containers, and methods of its own stand for the functions by which PyTorch writes tensors.
All other classes and objects become an `Unknown`, which remembers what the pickle says of them.
"""

import math
import pickletools

import numpy as np
import torch


class CheckpointError(ValueError):
    """The file is not an SD 1.x checkpoint that can be loaded; the message says why and what was expected."""


class Unknown(dict):
    """A class, or an object of a class, that is not rebuilt: its name, arguments, attributes and items."""

    __slots__ = ("name", "args", "state")

    def __init__(self, name, args=()):
        self.name, self.args, self.state = name, args, None


def describe(value):
    """Returns in words what a pickle holds where something else was expected."""
    return f"{value.name!r} object" if isinstance(value, Unknown) else type(value).__name__


MAX_STEPS = 2_000_000  # SD 1.5 with its training state takes 100,000
LITERALS = set("INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
               "SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split())
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class Unpickler:
    """Runs one pickle from the place where `content`, a memory map of its file, stands.

    Memory and time stay in proportion to the file, whatever the pickle says: steps and the sizes of tensors are counted,
    and keys that are not texts are dropped (hashing nested ones overflows the stack, numbers can be made to collide).
    `load_storage` gets the parts of a persistent id and returns the storage's values as a tensor of one dimension.
    """

    def __init__(self, content, load_storage=None):
        self.content, self.load_storage = content, load_storage
        self.stack, self.marks, self.memo = [], [], {}
        self.steps_left = MAX_STEPS
        self.bytes_left = 2 * len(content) + 2**20  # weights may be tied or expanded, within reason

    def run(self):
        for opcode, argument, _ in pickletools.genops(self.content):
            self.spend(1)
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)

    def spend(self, steps):
        self.steps_left -= steps
        if self.steps_left < 0:
            raise CheckpointError(f"found a pickle of more than {MAX_STEPS:,} steps; expected a dict of weights")

    def step(self, opcode, argument):
        stack = self.stack
        match opcode:
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                index = len(self.memo) if opcode == "MEMOIZE" else argument
                if index not in range(2**32):
                    raise CheckpointError("found a pickle with an impossible index; expected one that torch.save wrote")
                self.memo[index] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case _ if opcode in LITERALS:
                stack.append(argument)
            case _ if opcode in CONSTANTS:
                stack.append(CONSTANTS[opcode])
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_SET":
                stack.append(Unknown("builtins.set"))
            case "FROZENSET":
                stack.append(Unknown("builtins.frozenset", self.pop_to_mark()))
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self.pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "APPEND":
                self.append([stack.pop()])
            case "APPENDS" | "ADDITEMS":
                self.append(self.pop_to_mark())
            case "SETITEM":
                self.set_items([stack.pop(-2), stack.pop()])
            case "SETITEMS":
                self.set_items(self.pop_to_mark())
            case "GLOBAL":
                stack.append(self.find(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(self.find(stack.pop(-2), stack.pop()))
            case "REDUCE" | "NEWOBJ":
                stack.append(self.call(stack.pop(-2), stack.pop()))
            case "NEWOBJ_EX":
                _keywords = stack.pop()
                stack.append(self.call(stack.pop(-2), stack.pop()))
            case "BUILD":
                self.build(stack.pop())
            case "BINPERSID":
                stack.append(self.load_storage(*stack.pop()))
            case "POP" if self.marks and self.marks[-1] == len(stack):
                self.marks.pop()
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.pop_to_mark()
            case "PROTO" | "FRAME":
                pass
            case _:
                raise CheckpointError(f"found a pickle with the opcode {opcode}, which torch.save does not write; "
                                      f"nothing was executed; expected tensors and plain containers")

    def pop_to_mark(self):
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def append(self, items):
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Unknown):
            raise CheckpointError(f"found a pickle that appends to a {describe(target)}; expected a list")

    def set_items(self, items):
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise CheckpointError(f"found a pickle that sets items of a {describe(target)}; expected a dict")
        target.update((key, value) for key, value in zip(items[::2], items[1::2]) if isinstance(key, str))

    def build(self, state):
        """Attributes of tensors and dicts are dropped; those of a dict could hide its methods."""
        target = self.stack[-1]
        if not isinstance(target, Unknown):
            return
        target.state = state
        if target.name.endswith(".ParameterDict"):
            self.spend(len(state["_parameters"]))
            target.update(state["_parameters"])

    def find(self, module, name):
        """Returns what stands for a class or function: a dtype (for storages, too), a method of ours or `Unknown`."""
        root = module.partition(".")[0]
        if root == "torch" and name in STORAGES:
            return STORAGES[name]
        if root in ("torch", "collections") and name in REBUILT:
            return REBUILT[name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):  # getattr would import submodules
            return vars(torch)[name]
        if root in DANGEROUS_MODULES or (root in PARTLY_DANGEROUS_MODULES and name in DANGEROUS_NAMES):
            raise CheckpointError(f"found a pickle that calls {f'{module}.{name}'[:100]!r}, which no honest checkpoint "
                                  f"does; nothing was executed; expected tensors and plain containers: do not use this "
                                  f"file")
        return Unknown(f"{module}.{name}"[:100])

    def call(self, function, args):
        if isinstance(function, Unknown):
            return Unknown(function.name, args)
        return function(self, *args)

    # ---- in the place of the functions in torch/_utils.py and torch/_tensor.py

    def rebuild_tensor(self, storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
        if len(size) > 16 or not all(isinstance(n, int) and 0 <= n < 2**40 for n in (offset, *size, *stride)):
            raise CheckpointError("found a tensor of impossible shape; expected weights")
        self.claim(math.prod(size) * storage.itemsize, size)
        end = offset + sum((n - 1) * step for n, step in zip(size, stride)) + 1
        if math.prod(size) and end > len(storage):
            raise self.incomplete(size)
        return storage.as_strided(size, stride, storage.storage_offset() + offset)

    def rebuild_tensor_v3(self, storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
        return self.rebuild_tensor(storage.view(dtype), offset, size, stride)

    def rebuild_from_numpy(self, array, *device):
        _, shape, dtype, is_fortran, values = array.state
        if isinstance(values, Unknown):  # _codecs.encode(text, "latin1"), as protocol 2 has no bytes
            values = values.args[0].encode("latin1")
        self.claim(len(values), shape)
        values = np.frombuffer(bytearray(values), np.dtype(dtype.state[1] + dtype.args[0]))
        return torch.from_numpy(values.reshape(shape, order="F" if is_fortran else "C"))

    def rebuild_same(self, tensor, *settings):
        return tensor

    def rebuild_from_type(self, function, kind, args, state):
        return self.call(function, args)

    def rebuild_dict(self, pairs=()):
        self.spend(len(pairs))  # Python 2 gives them at once
        return {key: value for key, value in pairs if isinstance(key, str)}

    def rebuild_defaultdict(self, default_factory=None):
        return {}

    def claim(self, size, shape):
        self.bytes_left -= size
        if self.bytes_left < 0:
            raise self.incomplete(shape)

    def incomplete(self, shape):
        key = next((value for value in reversed(self.stack) if isinstance(value, str)), "a tensor")
        return CheckpointError(f"{key[:200]!r} has shape {shape}, of which the file holds but a part; expected all "
                               f"of it")


REBUILT = {
    "_rebuild_tensor": Unpickler.rebuild_tensor,
    "_rebuild_tensor_v2": Unpickler.rebuild_tensor,
    "_rebuild_tensor_v3": Unpickler.rebuild_tensor_v3,
    "_rebuild_parameter": Unpickler.rebuild_same,
    "_rebuild_parameter_with_state": Unpickler.rebuild_same,
    "_rebuild_from_type": Unpickler.rebuild_from_type,
    "_rebuild_from_type_v2": Unpickler.rebuild_from_type,
    "_rebuild_device_tensor_from_cpu_tensor": Unpickler.rebuild_same,
    "_rebuild_device_tensor_from_numpy": Unpickler.rebuild_from_numpy,
    "_rebuild_xla_tensor": Unpickler.rebuild_from_numpy,
    "OrderedDict": Unpickler.rebuild_dict,
    "defaultdict": Unpickler.rebuild_defaultdict,
}
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8, "_UntypedStorage": torch.uint8,
}

# What runs code, starts programs, imports, opens files or connections. None of it is called here, but a file that asks
# for it attacks whoever loads it elsewhere. All else (loggers, regular expressions, iterators, ...) is let pass.
DANGEROUS_MODULES = set(
    "_ctypes _frozen_importlib _frozen_importlib_external _imp _pickle _posixshmem _posixsubprocess _socket _thread "
    "_winapi antigravity asyncio atexit bdb cProfile code codeop commands concurrent ctypes dbm dill distutils doctest "
    "ensurepip faulthandler fileinput ftplib gc http idlelib imaplib imp importlib inspect lib2to3 linecache marshal "
    "mmap msvcrt multiprocessing nntplib nt os pdb pickle pip pkgutil platform poplib popen2 posix profile pty pydoc "
    "runpy select selectors shelve shutil signal site smtplib socket socketserver sqlite3 ssl subprocess sys telnetlib "
    "tempfile test this threading timeit tkinter trace turtle unittest urllib urllib2 venv webbrowser winreg wsgiref "
    "xmlrpc zipapp zipimport".split())
PARTLY_DANGEROUS_MODULES = {"builtins", "__builtin__", "io", "_io", "types", "operator", "functools"}
DANGEROUS_NAMES = set(
    "__build_class__ __import__ apply breakpoint compile delattr eval exec execfile exit file getattr globals help "
    "input locals open open_code quit raw_input reload setattr vars FileIO CodeType FunctionType "
    "attrgetter methodcaller reduce".split())
