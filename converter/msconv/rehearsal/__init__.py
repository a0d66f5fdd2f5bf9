"""The rehearsal: the real SGLang server on its own NPU path, on a stand-in for the device.

    device/       put on the server's path: a device of PyTorch named npu, and stand-ins for torch_npu, HCCL,
                  MindSpore's Ascend half and the kernels' packages.  Part of no import here
    plan          target, commands and scenario, decided and checked before anything starts
    scenario      what is asked, and whether all of it was answered
    build         the device's library
    server        the processes of SGLang with the stand-ins on their path: started, watched, ended
    client        the server's HTTP interface
    protocol      what the device's processes and the comparison agree on
    records       what the server's processes wrote down of their graph calls
    loading       whether each rank loaded its own weights, groups and device
    calls         whether one call's inputs mean what the graph takes them for
    served        the graphs and weights that a server loads, of a model and its draft, read anew
    replay        every call once more, by the interpreter of all ranks, on weights that it reads itself
    answers       tokens and logits against transformers, and tokens against the logits they came of
    judgement     all of these comparisons, and the outcome
    rehearse      the whole, and its record in the manifest

Nothing else of msconv imports this but the command line.
"""
