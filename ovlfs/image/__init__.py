"""What is in this file, and which layers does it name?

This room turns what a user typed (`image.tar:app:v2`) into an `Image`: a verified config and a list of layers,
bottom first, each a range of bytes in a file.  Nothing is unpacked and nothing is believed before its digest is
checked.  Reading order: reference (what was typed), form (what the file is), archive (its members), manifest and
config (its documents), platform (which of several), image (the answer), blob (bytes and decompression), store
(what is kept between mounts).

Blocking code, bytes end to end; it imports neither layer/ nor the event loop.
"""
