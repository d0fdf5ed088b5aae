"""Writes `.pth` files as PyTorch does, honest and hostile ones, without PyTorch."""

import collections
import io
import pickle
import struct
import zipfile


class Global:
    """Pickles as a call of any name, whether or not it can be imported here."""

    def __init__(self, module, name, arguments):
        self.module, self.name, self.arguments = module, name, arguments


class Storage:
    def __init__(self, kind, key, values):
        self.kind, self.key, self.values = kind, key, values


def tensor(storage, offset, shape, strides):
    return Global(
        "torch._utils",
        "_rebuild_tensor_v2",
        (storage, offset, shape, strides, False, collections.OrderedDict()),
    )


class Name:
    def __init__(self, module, name):
        self.module, self.name = module, name


class Pickler(pickle._Pickler):
    """Python's own pickler, writing `Name` as the GLOBAL opcode that PyTorch's files hold."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_name(self, item):
        self.write(f"c{item.module}\n{item.name}\n".encode())

    def save_call(self, item):
        self.save_name(item)
        self.save(item.arguments)
        self.write(b"R")

    dispatch[Name] = save_name
    dispatch[Global] = save_call

    def persistent_id(self, item):
        if isinstance(item, Storage):
            return ("storage", Name("torch", item.kind), item.key, "cpu", len(item.values), *self.view)
        return None


def dump(item, view=()):
    stream = io.BytesIO()
    pickler = Pickler(stream, protocol=2)
    pickler.view = view
    pickler.dump(item)
    return stream.getvalue()


def legacy(state, storages):
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    keys = [storage.key for storage in storages]
    data = b"".join(struct.pack("<q", len(s.values)) + s.values.tobytes() for s in storages)
    return b"".join(map(dump, head)) + dump(state, (None,)) + dump(keys) + data


def zipped(state, storages):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("model/data.pkl", dump(state))
        archive.writestr("model/byteorder", "little")
        for storage in storages:
            archive.writestr(f"model/data/{storage.key}", storage.values.tobytes())
    return stream.getvalue()
