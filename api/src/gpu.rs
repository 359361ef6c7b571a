//! Errors that NVIDIA's driver reports of a GPU by number ("Xid"), and who is to blame for each: the program, the hardware, or nobody can say.
//!
//! After NVIDIA's catalogue (<https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html>). Its advice decides: where the program is
//! to be checked, the program is to blame; where the GPU is to be reset, the machine restarted or power connected, the hardware is, and the GPU
//! is no good before; errors of memory and links that it leaves to be watched are the hardware's, too, but one may be chance. Only numbers
//! of which that is clear are here. Any other one blames nobody.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::time::Timestamp;

/// Who is to blame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum XidClass {
    /// What the program did.
    Program,
    /// The GPU, its links or its power.
    Hardware,
    /// The driver.
    Driver,
    /// Nobody can say by the number.
    Unknown,
}

/// What is known of a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Xid {
    /// Who is to blame.
    pub class: XidClass,
    /// The GPU is no good before it was reset or replaced.
    pub needs_reset: bool,
    /// What it did, after the GPU's name in a sentence.
    pub what: &'static str,
}

impl Xid {
    /// The catalogue's entry of a number.
    pub fn of(number: u32) -> Self {
        let (class, needs_reset, what) = match number {
            // Only a consequence, also of a kill.
            45 => (XidClass::Unknown, false, "cleaned up work that was cut off"),
            11 | 25 | 32 => (XidClass::Program, false, "was sent commands that are not valid"),
            13 => (XidClass::Program, false, "had an exception in what it computed"),
            31 => (XidClass::Program, false, "had a page fault on memory that is not the program's"),
            43 => (XidClass::Program, false, "stopped the program's work after a fault"),
            68 => (XidClass::Program, false, "had an exception in its video decoder"),
            69 => (XidClass::Program, false, "was given work of a class that it does not know"),
            80 => (XidClass::Program, false, "was sent corrupted data"),
            37 | 38 => (XidClass::Driver, false, "had an error in the driver's firmware"),
            66 | 67 => (XidClass::Driver, false, "was accessed by the driver in a way that is not allowed"),
            46 => (XidClass::Hardware, true, "stopped processing"),
            48 => (XidClass::Hardware, true, "had a double-bit memory error (ECC)"),
            54 => (XidClass::Hardware, true, "has no auxiliary power"),
            62 => (XidClass::Hardware, true, "halted in its micro-controller"),
            64 => (XidClass::Hardware, true, "could not remap a broken row of its memory"),
            79 => (XidClass::Hardware, true, "fell off the bus"),
            95 => (XidClass::Hardware, true, "had an uncontained memory error"),
            109 => (XidClass::Hardware, true, "did not switch between pieces of work in time"),
            119 => (XidClass::Hardware, true, "got no answer from its system processor (GSP)"),
            120 => (XidClass::Hardware, true, "had an error in its system processor (GSP)"),
            136 => (XidClass::Hardware, true, "could not bring up a link"),
            140 => (XidClass::Hardware, true, "had a memory error that could not be recovered (ECC)"),
            143 => (XidClass::Hardware, true, "could not be initialized"),
            158 => (XidClass::Hardware, true, "had a fatal timeout"),
            63 => (XidClass::Hardware, false, "remapped a broken row of its memory"),
            74 | 144..=150 => (XidClass::Hardware, false, "had an error on NVLink"),
            92 => (XidClass::Hardware, false, "had many single-bit memory errors (ECC)"),
            94 => (XidClass::Hardware, false, "had a contained memory error"),
            _ => (XidClass::Unknown, false, "had an error"),
        };
        Self { class, needs_reset, what }
    }
}

/// An error that a GPU had, as the driver reported it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GpuError {
    /// Index as the driver counts.
    pub gpu: u32,
    /// Unique id of the device: an index may be another one's after a restart of the machine.
    pub uuid: String,
    /// NVIDIA's number for the error.
    pub xid: u32,
    /// When the agent heard of it.
    pub at: Timestamp,
}

impl GpuError {
    /// What is known of its number.
    pub fn about(&self) -> Xid {
        Xid::of(self.xid)
    }

    /// The hardware is to blame.
    pub fn is_hardware(&self) -> bool {
        self.about().class == XidClass::Hardware
    }

    /// Like `GPU 3 of n1 fell off the bus (Xid 79): the hardware, not the program`; `node` may be left out.
    pub fn describe(&self, node: Option<&str>) -> String {
        let Xid { class, what, .. } = self.about();
        let whose = match class {
            XidClass::Program => ": the program, not the hardware",
            XidClass::Hardware => ": the hardware, not the program",
            XidClass::Driver => ": the driver",
            XidClass::Unknown => "",
        };
        let of = node.map(|node| format!(" of {node}")).unwrap_or_default();
        format!("GPU {}{of} {what} (Xid {}){whose}", self.gpu, self.xid)
    }

    /// Of several errors at about the same time the one with the smallest key tells the cause: what breaks a GPU for good, then the
    /// hardware, then what the program or the driver did, and last what only follows from others; among equals the earliest.
    pub fn causes_first(&self) -> (u8, Timestamp) {
        let Xid { class, needs_reset, .. } = self.about();
        let order = match (class, self.xid) {
            (XidClass::Hardware, _) if needs_reset => 0,
            (XidClass::Hardware, _) => 1,
            // Both tell that work was ended, not why.
            (_, 43 | 45) => 4,
            (XidClass::Program | XidClass::Driver, _) => 2,
            (XidClass::Unknown, _) => 3,
        };
        (order, self.at)
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn error(xid: u32, at: u64) -> GpuError {
        GpuError { gpu: 3, uuid: "GPU-3".into(), xid, at: Timestamp(at) }
    }

    #[test]
    fn each_number_is_told_with_who_is_to_blame() {
        let numbers = [13, 31, 43, 45, 68, 69, 38, 48, 62, 63, 64, 74, 79, 92, 94, 95, 119, 120, 147, 7, 999, 0];
        let told = |xid: u32| {
            let reset = if Xid::of(xid).needs_reset { ", needs a reset" } else { "" };
            format!("{}{reset}\n", error(xid, 1).describe(Some("n1")))
        };
        expect![[r#"
            GPU 3 of n1 had an exception in what it computed (Xid 13): the program, not the hardware
            GPU 3 of n1 had a page fault on memory that is not the program's (Xid 31): the program, not the hardware
            GPU 3 of n1 stopped the program's work after a fault (Xid 43): the program, not the hardware
            GPU 3 of n1 cleaned up work that was cut off (Xid 45)
            GPU 3 of n1 had an exception in its video decoder (Xid 68): the program, not the hardware
            GPU 3 of n1 was given work of a class that it does not know (Xid 69): the program, not the hardware
            GPU 3 of n1 had an error in the driver's firmware (Xid 38): the driver
            GPU 3 of n1 had a double-bit memory error (ECC) (Xid 48): the hardware, not the program, needs a reset
            GPU 3 of n1 halted in its micro-controller (Xid 62): the hardware, not the program, needs a reset
            GPU 3 of n1 remapped a broken row of its memory (Xid 63): the hardware, not the program
            GPU 3 of n1 could not remap a broken row of its memory (Xid 64): the hardware, not the program, needs a reset
            GPU 3 of n1 had an error on NVLink (Xid 74): the hardware, not the program
            GPU 3 of n1 fell off the bus (Xid 79): the hardware, not the program, needs a reset
            GPU 3 of n1 had many single-bit memory errors (ECC) (Xid 92): the hardware, not the program
            GPU 3 of n1 had a contained memory error (Xid 94): the hardware, not the program
            GPU 3 of n1 had an uncontained memory error (Xid 95): the hardware, not the program, needs a reset
            GPU 3 of n1 got no answer from its system processor (GSP) (Xid 119): the hardware, not the program, needs a reset
            GPU 3 of n1 had an error in its system processor (GSP) (Xid 120): the hardware, not the program, needs a reset
            GPU 3 of n1 had an error on NVLink (Xid 147): the hardware, not the program
            GPU 3 of n1 had an error (Xid 7)
            GPU 3 of n1 had an error (Xid 999)
            GPU 3 of n1 had an error (Xid 0)
        "#]]
        .assert_eq(&numbers.map(told).concat());
        assert_eq!(error(79, 1).describe(None), "GPU 3 fell off the bus (Xid 79): the hardware, not the program");
    }

    #[test]
    fn only_hardware_needs_a_reset() {
        assert!((0..1_000).map(Xid::of).all(|xid| !xid.needs_reset || xid.class == XidClass::Hardware));
    }

    #[test]
    fn of_several_errors_the_cause_comes_first_and_what_follows_from_others_last() {
        let mut errors = [error(45, 1), error(31, 9), error(7, 2), error(94, 5), error(79, 8), error(48, 7)];
        errors.sort_by_key(GpuError::causes_first);
        assert_eq!(errors.map(|error| error.xid), [48, 79, 94, 31, 7, 45]);
    }
}
