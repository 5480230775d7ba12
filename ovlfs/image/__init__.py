"""What is in this file, and which layers does it name?

This room turns what a user typed (`image.tar:app:v2`) into an `Image`: a verified config and a list of layers,
bottom first, each a range of bytes in a file.  Nothing is unpacked and nothing is believed before its digest is
checked.  Reading order: reference (what was typed), form (what the file is), archive (its members), manifest and
config (its documents), platform (which of several), image (the answer), blob (bytes and decompression), store
(what is kept between mounts).

And the way back: layer_tar (the tar of a new layer), blob_writer (compressed, with its digests), new_config (the config
after one more step), commit (all of it in a file or a layout).

Blocking code, bytes end to end; it imports neither layer/ nor the event loop.
"""
