//! Bodies of `POST /jobs`: whatever is accepted is kept, read from the store, and accepted again when a user sends back what was shown.
#![no_main]

use everlit_api::job::{FaultKind, JobSpec, parse};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|data: &[u8]| {
    let Ok(body) = serde_json::from_slice::<Value>(data) else { return };
    match parse(&body) {
        Ok(spec) => {
            let kept = serde_json::to_string(&spec).expect("a job is plain data");
            let stored: JobSpec = serde_json::from_str(&kept).unwrap_or_else(|bad| panic!("the store can not read it: {bad}: {kept}"));
            assert_eq!(stored, spec, "the store has another job: {kept}");
            let shown: Value = serde_json::from_str(&kept).expect("JSON");
            match parse(&shown) {
                Ok(again) => assert_eq!(again, spec, "sent again it is another job: {kept}"),
                Err(faults) => panic!("what was accepted is refused: {faults:?}: {kept}"),
            }
        }
        Err(faults) => {
            assert!(!faults.is_empty());
            for fault in faults {
                assert!(!fault.detail.is_empty() && (fault.pointer.is_empty() || fault.pointer.starts_with('/')), "{fault:?}");
                assert!(matches!(fault.kind, FaultKind::Invalid | FaultKind::NotSupported));
            }
        }
    }
});
