//! Frames of the link between agents and coordinator, both ways: what can be read can be written and read again, and nothing else does harm.
#![no_main]

use everlit_api::agent::log::Records;
use everlit_api::agent::pack::{self, Unpacked};
use everlit_api::agent::{FRAME_BYTES_MAX, FromAgent, LogFrame, ToAgent};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

fuzz_target!(|data: &[u8]| {
    match pack::unpack(data) {
        Ok(Some(Unpacked::Text(text))) => {
            assert!(text.len() <= FRAME_BYTES_MAX);
            frame(&text);
        }
        Ok(Some(Unpacked::Binary(bytes))) => {
            assert!(bytes.len() <= FRAME_BYTES_MAX);
            log(&bytes);
        }
        Ok(None) => log(data),
        Err(bad) => assert!(!bad.to_string().is_empty()),
    }
    if let Some(packed) = pack::pack_binary(data) {
        assert!(packed.len() < data.len());
        assert_eq!(pack::unpack(&packed), Ok(Some(Unpacked::Binary(data.to_vec()))));
    }
    if let Ok(text) = std::str::from_utf8(data) {
        frame(text);
    }
});

fn frame(text: &str) {
    same_again::<FromAgent>(text);
    same_again::<ToAgent>(text);
}

/// What was read from outside is written and read by us again. Numbers may lose their last bit on the way, so it is not compared.
fn same_again<T: Serialize + DeserializeOwned>(text: &str) {
    if let Ok(frame) = serde_json::from_str::<T>(text) {
        let again = serde_json::to_string(&frame).expect("frames are plain data");
        serde_json::from_str::<T>(&again).unwrap_or_else(|bad| panic!("{bad}: {again}"));
    }
}

fn log(bytes: &[u8]) {
    let Some(header) = LogFrame::decode(bytes) else { return };
    let records = &bytes[LogFrame::BYTES..];
    let again = header.encode(records);
    assert_eq!(LogFrame::decode(&again), Some(header));
    for complete in [false, true] {
        let mut end = 0;
        let mut all = Records::new(records, complete);
        for record in all.by_ref() {
            assert!(record.at >= end && record.end > record.at && record.end <= records.len(), "in order, and inside");
            end = record.end;
        }
        assert!(all.consumed() <= records.len());
        assert!(!complete || all.consumed() == records.len(), "nothing is waited for that never comes");
    }
}
