"""How does a Dockerfile become an image?

    dockerfile  the text: which instructions, with which flags, arguments and here-documents
    words       one instruction's words: quotes, escapes, variables
    ignore      .dockerignore
    scope       which variables an instruction sees
    settings    what an instruction changes in the config, and what it writes into the history
    change      the same for `ovlfs commit --change`
    trees       where COPY and ADD take from: the context, a stage, an image, a tar; paths with symlinks in them
    copying     COPY and ADD: one merged tree into another
    steps       one layer: a fresh upperdir over the layers so far, changed, and written as a layer
    cache       which layer a step made the last time
    builder     the stages, one step after the other

The reference is docker's classic builder (moby builder/dockerfile/dispatchers.go, copy.go; `DOCKER_BUILDKIT=0`), in
what ends up in the tree, in the config and in the history; from BuildKit come here-documents, --chmod and the
platform arguments, which the classic builder does not have.
"""
