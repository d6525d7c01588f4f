//! Commands typed as a line: `properties::inline` for any bytes.
#![no_main]

#[path = "../properties.rs"]
mod properties;

libfuzzer_sys::fuzz_target!(|data: &[u8]| properties::inline(data));
