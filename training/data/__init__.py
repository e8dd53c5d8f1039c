"""Captioned images and prompts: folders, buckets, masks, captions, order, caches."""
