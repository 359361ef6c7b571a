//! The frames of a thread that waits, from its stack's memory alone: nothing is stopped or attached to.
//!
//! The kernel tells stack and instruction pointer of a thread that is in a system call. From there the files' own tables say how each frame
//! is undone. What they need beyond the two pointers is the frame pointer, which is not known at first: where it is asked for before a frame
//! has given it back, the next word on the stack that looks like a return address is taken, and its frame is marked as a guess.

use std::collections::{BTreeMap, BTreeSet};
use std::io::IoSliceMut;
use std::path::Path;

use framehop::x86_64::{CacheX86_64, UnwindRegsX86_64, UnwinderX86_64};
use framehop::{FrameAddress, Unwinder};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use super::Frame;
use super::files::{Code, Mapping, Part};

/// Executable files of one process.
const FILES_MAX: usize = 1024;
/// Frames of one thread.
const FRAMES_MAX: usize = 48;
/// Of a stack, from its pointer up.
const STACK_PAGES_MAX: usize = 64;
const PAGE: usize = 4096;
/// How far a return address is looked for.
const GUESS_WORDS_MAX: u64 = 512;
/// A frame pointer that is not known: below every stack, so that whoever asks for it fails.
const UNKNOWN: u64 = 1;

/// A process whose threads' frames are told.
pub(super) struct Process {
    pid: Pid,
    codes: Vec<Code>,
    unwinder: UnwinderX86_64<Part>,
    cache: CacheX86_64,
}

impl Process {
    pub(super) fn open(root: &Path, pid: u32, mappings: &[Mapping<'_>]) -> Self {
        let mut unwinder = UnwinderX86_64::new();
        let mut codes = Vec::new();
        for (code, module) in mappings.iter().take(FILES_MAX).filter_map(|mapping| Code::open(root, mapping)) {
            unwinder.add_module(module);
            codes.push(code);
        }
        Self { pid: Pid::from_raw(pid.cast_signed()), codes, unwinder, cache: CacheX86_64::new() }
    }

    /// The frames of a thread, the innermost first.
    pub(super) fn frames(&mut self, sp: u64, pc: u64) -> Vec<Frame> {
        let stack = Stack::read(self.pid, sp);
        let mut read = |at: u64| stack.word(at).ok_or(());
        let mut frames = vec![Frame { at: pc, guessed: false }];
        let mut address = FrameAddress::from_instruction_pointer(pc);
        let mut regs = UnwindRegsX86_64::new(pc, sp, UNKNOWN);
        while frames.len() < FRAMES_MAX {
            let below = regs.sp();
            let undone = self.unwinder.unwind_frame(address, &mut regs, &mut self.cache, &mut read);
            let (back, guessed) = match undone {
                // The first function of a thread.
                Ok(None) => break,
                Ok(Some(back)) if regs.sp() > below && self.is_code(back) => (back, false),
                _ => {
                    let Some((at, back)) = self.guess(&stack, below) else { break };
                    // A function with a frame pointer keeps its caller's right below the address that it returns to.
                    let bp = stack.word(at - 8).filter(|bp| *bp > at && stack.word(*bp).is_some());
                    regs = UnwindRegsX86_64::new(back, at + 8, bp.unwrap_or(UNKNOWN));
                    (back, true)
                }
            };
            frames.push(Frame { at: back - 1, guessed });
            let Some(next) = FrameAddress::from_return_address(back) else { break };
            address = next;
        }
        frames
    }

    /// The functions that these frames are in.
    pub(super) fn names(&self, frames: &BTreeMap<u32, Vec<Frame>>) -> BTreeMap<u64, String> {
        let wanted: BTreeSet<u64> = frames.values().flatten().map(|frame| frame.at).collect();
        let asked = self.codes.iter().filter(|code| wanted.iter().any(|at| code.contains(*at)));
        asked.flat_map(|code| code.names(&wanted)).collect()
    }

    fn is_code(&self, at: u64) -> bool {
        self.codes.iter().any(|code| code.contains(at))
    }

    /// The next place on the stack with an address behind a call.
    fn guess(&self, stack: &Stack, from: u64) -> Option<(u64, u64)> {
        let from = from.next_multiple_of(8);
        let mut places = (0..GUESS_WORDS_MAX).map_while(|word| Some((from + 8 * word, stack.word(from + 8 * word)?)));
        places.find(|(_, back)| self.codes.iter().any(|code| code.contains(*back) && code.follows_call(*back)))
    }
}

/// The memory of a stack, as far as it can be read.
struct Stack {
    from: u64,
    bytes: Vec<u8>,
}

impl Stack {
    fn read(pid: Pid, sp: u64) -> Self {
        let from = sp & !(PAGE as u64 - 1);
        let mut bytes = vec![0; STACK_PAGES_MAX * PAGE];
        // A part for each page: what can not be read ends it, and costs nothing of what could.
        let part = |page: usize| RemoteIoVec { base: usize::try_from(from).unwrap_or(0) + page * PAGE, len: PAGE };
        let parts: Vec<RemoteIoVec> = (0..STACK_PAGES_MAX).map(part).collect();
        let read = process_vm_readv(pid, &mut [IoSliceMut::new(&mut bytes)], &parts).unwrap_or(0);
        bytes.truncate(read);
        Self { from, bytes }
    }

    fn word(&self, at: u64) -> Option<u64> {
        let from = usize::try_from(at.checked_sub(self.from)?).ok()?;
        Some(u64::from_le_bytes(self.bytes.get(from..from.checked_add(8)?)?.try_into().ok()?))
    }
}
