//! The executable files that a process runs: where they are in its memory, how their frames are undone, and the names of their functions.
//!
//! Files are mapped, not read: a library of libtorch's size costs only the pages that are looked at. A mapped file that is cut short
//! meanwhile kills whoever reads it, which is why all of this happens in a process of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::{Deref, Range};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use cpp_demangle::DemangleOptions;
use framehop::{ExplicitModuleSectionInfo, Module};
use memmap2::Mmap;
use object::elf::{FileHeader64, PF_X};
use object::read::elf::ElfFile;
use object::{Endianness, Object, ObjectSection, ObjectSegment, ObjectSymbol, SegmentFlags, SymbolKind};

/// Bytes of a function's name that are shown.
const NAME_BYTES_MAX: usize = 120;
/// Depth of a C++ name that is followed.
const NAME_DEPTH_MAX: u32 = 128;

type Elf<'a> = ElfFile<'a, FileHeader64<Endianness>>;

/// An executable mapping of `/proc/PID/maps`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mapping<'a> {
    pub(super) memory: Range<u64>,
    /// Of the mapping's begin in the file.
    pub(super) offset: u64,
    pub(super) inode: u64,
    pub(super) file: &'a str,
}

/// The executable mappings of files.
pub(super) fn mappings(maps: &str) -> Vec<Mapping<'_>> {
    let parse = |line| {
        let line: &str = line;
        let mut words = line.split_ascii_whitespace();
        let (from, to) = words.next()?.split_once('-')?;
        let executable = words.next()?.contains('x');
        let offset = words.next()?;
        let inode = words.nth(1)?.parse().ok()?;
        let file = words.next().filter(|file| executable && file.starts_with('/'))?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        Some(Mapping { memory: number(from)?..number(to)?, offset: number(offset)?, inode, file })
    };
    maps.lines().filter_map(parse).collect()
}

/// Where an address is: file and offset there, as `addr2line` wants them.
pub(super) fn place_of(at: u64, maps: &[Mapping<'_>]) -> Option<String> {
    let own = maps.iter().find(|own| own.memory.contains(&at))?;
    let name = own.file.rsplit('/').next().unwrap_or(own.file);
    Some(format!("{name}+{:#x}", at - own.memory.start + own.offset))
}

/// Part of a mapped file.
pub(super) struct Part {
    map: Arc<Mmap>,
    range: Range<usize>,
}

impl Deref for Part {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }
}

/// A file that is mapped here too.
pub(super) struct Code {
    map: Arc<Mmap>,
    memory: Range<u64>,
    offset: u64,
    /// What is added to an address of the file's own.
    bias: u64,
}

impl Code {
    /// `None` when the file is not there any more, or is none that is understood.
    pub(super) fn open(process: &Path, mapping: &Mapping<'_>) -> Option<(Self, Module<Part>)> {
        let path = process.join("root").join(mapping.file.trim_start_matches('/'));
        let file = File::open(path).ok()?;
        // Another file may have its name by now.
        if file.metadata().ok()?.ino() != mapping.inode {
            return None;
        }
        // SAFETY: see above: this process is there for nothing else, and its end is expected.
        let map = Arc::new(unsafe { Mmap::map(&file) }.ok()?);
        let elf = Elf::parse(&map[..]).ok()?;
        let segment = elf.segments().find(|segment| {
            let (from, bytes) = segment.file_range();
            let executable = matches!(segment.flags(), SegmentFlags::Elf { p_flags, .. } if p_flags & PF_X == PF_X);
            // A mapping begins with the page that its segment begins in.
            executable && from < mapping.offset + (mapping.memory.end - mapping.memory.start) && mapping.offset < from + bytes
        })?;
        let bias = mapping.memory.start.wrapping_sub(mapping.offset).wrapping_add(segment.file_range().0).wrapping_sub(segment.address());
        let section = |name: &str| {
            let own = elf.section_by_name(name)?;
            let (from, bytes) = own.file_range()?;
            let range = usize::try_from(from).ok()?..usize::try_from(from.checked_add(bytes)?).ok()?;
            (range.end <= map.len()).then(|| (own.address()..own.address() + own.size(), Part { map: map.clone(), range }))
        };
        let (text_svma, text) = section(".text").unzip();
        let (eh_frame_svma, eh_frame) = section(".eh_frame").unzip();
        let (eh_frame_hdr_svma, eh_frame_hdr) = section(".eh_frame_hdr").unzip();
        let got_svma = section(".got").map(|(range, _)| range);
        let sections = ExplicitModuleSectionInfo {
            text_svma,
            text,
            eh_frame_svma,
            eh_frame,
            eh_frame_hdr_svma,
            eh_frame_hdr,
            got_svma,
            base_svma: 0,
            stubs_svma: None,
            stub_helper_svma: None,
            unwind_info: None,
            debug_frame: None,
            text_segment_svma: None,
            text_segment: None,
        };
        let module = Module::new(mapping.file.into(), mapping.memory.clone(), bias, sections);
        Some((Self { memory: mapping.memory.clone(), offset: mapping.offset, bias, map }, module))
    }

    pub(super) fn contains(&self, at: u64) -> bool {
        self.memory.contains(&at)
    }

    /// Whether the instruction before this address is a call: so it may be where one returns to.
    pub(super) fn follows_call(&self, at: u64) -> bool {
        let Ok(end) = usize::try_from(at - self.memory.start + self.offset) else { return false };
        let before = |bytes: usize| end.checked_sub(bytes).and_then(|from| self.map.get(from..end)).unwrap_or_default();
        // Calls of a register or of what is in memory: FF with 2 in the middle of the next byte.
        let indirect = |bytes: usize| matches!(before(bytes), [0xFF, mode, ..] if mode >> 3 & 7 == 2);
        matches!(before(5), [0xE8, ..]) || [2, 3, 4, 6, 7].into_iter().any(indirect)
    }

    /// The functions that these addresses are in, as far as the file has their names.
    pub(super) fn names(&self, wanted: &BTreeSet<u64>) -> BTreeMap<u64, String> {
        let Ok(elf) = Elf::parse(&self.map[..]) else { return BTreeMap::new() };
        let mut names = BTreeMap::new();
        for symbol in elf.symbols().chain(elf.dynamic_symbols()).filter(|symbol| symbol.kind() == SymbolKind::Text) {
            let from = symbol.address().wrapping_add(self.bias);
            for at in wanted.range(from..from.saturating_add(symbol.size())) {
                names.entry(*at).or_insert_with(|| readable(&String::from_utf8_lossy(symbol.name_bytes().unwrap_or_default())));
            }
        }
        names
    }
}

/// A function's name as its author wrote it, without parameters.
fn readable(symbol: &str) -> String {
    // Without the version of libc's functions and what a compiler added to a copy's name.
    let symbol = symbol.split(['@', '.']).next().unwrap_or(symbol);
    let has_hash = symbol.ends_with('E') && symbol.len() > 20 && symbol.get(symbol.len() - 20..).is_some_and(|end| end.starts_with("17h"));
    let name = if symbol.starts_with("_R") || (symbol.starts_with("_ZN") && has_hash) {
        format!("{:#}", rustc_demangle::demangle(symbol))
    } else if symbol.starts_with("_Z") {
        let options = DemangleOptions::new().no_params().no_return_type().recursion_limit(NAME_DEPTH_MAX);
        let parsed = cpp_demangle::Symbol::new(symbol).ok();
        parsed.and_then(|name| name.demangle_with_options(&options).ok()).unwrap_or_else(|| symbol.into())
    } else {
        symbol.into()
    };
    if name.len() <= NAME_BYTES_MAX { name } else { format!("{}…", &name[..name.floor_char_boundary(NAME_BYTES_MAX)]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_as_their_authors_wrote_them() {
        for (symbol, name) in [
            ("pthread_cond_wait@@GLIBC_2.3.2", "pthread_cond_wait"),
            (
                "_ZN4c10d16ProcessGroupGloo9allreduceERSt6vectorIN2at6TensorESaIS3_EERKNS_16AllreduceOptionsE",
                "c10d::ProcessGroupGloo::allreduce",
            ),
            ("_ZN3std6thread4park17h0123456789abcdefE", "std::thread::park"),
            ("_ZN3std2rt10lang_start28_$u7b$$u7b$closure$u7d$$u7d$17h0123456789abcdefE.llvm.123", "std::rt::lang_start::{{closure}}"),
            ("_ZNot a name", "_ZNot a name"),
            ("", ""),
        ] {
            assert_eq!(readable(symbol), name);
        }
        let long = readable(&"x".repeat(500));
        assert!(long.len() < 130 && long.ends_with('…'), "{long}");
    }

    #[test]
    fn executable_files_are_read_from_the_kernel_s_list() {
        let maps = "7f0000001000-7f0000002000 r-xp 00003000 fe:00 12 /lib/libc.so.6\n\
            7f0000002000-7f0000003000 rw-p 00004000 fe:00 12 /lib/libc.so.6\n\
            7ffc00001000-7ffc00002000 r-xp 00000000 00:00 0 [vdso]\nnonsense\n";
        let all = mappings(maps);
        assert_eq!(all.len(), 1, "{all:?}");
        assert_eq!((all[0].inode, all[0].offset), (12, 0x3000));
        assert_eq!(place_of(0x7f00_0000_1234, &all), Some("libc.so.6+0x3234".into()));
        assert_eq!(place_of(0x7f00_0000_2234, &all), None);
    }
}
