"""The checkpoint folder: writing, record and model card, exports, verification, fingerprints."""
