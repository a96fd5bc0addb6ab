"""Links for the bare names in docstrings: `Schedule` finds smcdiff.schedules.Schedule if there is no other."""

from sphinx.util.nodes import make_refnode


def resolve(app, env, node, contnode):
    """Handler of ``missing-reference``: a unique documented name that ends in the wanted one."""
    if node.get("refdomain") != "py":
        return None
    wanted = "." + node["reftarget"].rstrip("()")
    objects = env.get_domain("py").objects
    found = [(name, entry) for name, entry in objects.items() if name.endswith(wanted)]
    if len(found) != 1:
        return None
    name, entry = found[0]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name)


def setup(app):
    """Register the handler."""
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
