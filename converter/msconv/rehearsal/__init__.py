"""The rehearsal: the real SGLang server on its own NPU path, on a stand-in for the device.

    device/       put on the server's path: a device of PyTorch named npu, and stand-ins for torch_npu, HCCL,
                  MindSpore's Ascend half and the kernels' packages.  Part of no import here
    build         the device's library
    server        starts the command of `msconv serve --device npu` with the stand-ins, asks, stops
    scenario      what is asked
    records       what the server's processes wrote down of their graph calls
    calls         whether one call's inputs mean what the graph takes them for
    replay        every call once more, by the interpreter of all ranks, on weights that it reads itself
    rehearse      the whole, and its result

Nothing else of msconv imports this but the command line.
"""
