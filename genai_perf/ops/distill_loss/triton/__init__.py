from ...._backends import triton as toolchain


def why_not(logits, *rest):
    return toolchain.why_not(logits)


why_not_inplace = why_not_linear = why_not
