//! Scenarios through one harness.
