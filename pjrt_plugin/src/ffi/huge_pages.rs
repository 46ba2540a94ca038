//! Messages in huge pages.
//!
//! Ranks of one node read each other's memory through the kernel (`process_vm_readv(2)`), which
//! looks up every page of it: with pages of 2 MiB in place of 4 KiB that is most of the time of a
//! message spared (docs/measurements.md). Arrays lie in the heap (`plugin::keep_memory`), whose
//! pages are small unless asked for. So the first time that a message lies in a block of 2 MiB, its
//! pages are made one.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::LazyLock;

use parking_lot::Mutex;

use mpi_runtime::Operation;

/// Size of a huge page.
const BLOCK: usize = 2 << 20;
/// Messages below are copied twice through memory that ranks share, or gain too little.
const SMALLEST: usize = 32 << 10;
/// Arrays from here may be mapped and unmapped every time by an allocator that is not ours to set.
const OFTEN_MAPPED: usize = 16 << 20;
/// Where the kernel says for which memory it has huge pages.
const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// How often a block is asked for that has no pages yet, or cannot have a huge one just now.
const ATTEMPTS: u8 = 4;
/// Blocks of the heap outside arrays that are asked for; each takes about a millisecond, once.
const OTHERS: usize = 256;

/// What has been asked for.
struct Pages {
    /// The heap begins here, if it is known.
    heap: Option<usize>,
    /// How often, by the number of the block; `ATTEMPTS` if it is a huge page.
    asked: HashMap<usize, u8>,
    /// How many of the heap's other blocks are left to ask for, and where it ended when it had
    /// none.
    others: usize,
    searched: usize,
}

/// None if memory is in huge pages without asking, or never.
static PAGES: LazyLock<Option<Mutex<Pages>>> = LazyLock::new(|| {
    let asked_for = std::fs::read_to_string(SETTING).is_ok_and(|text| text.contains("[madvise]"));
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    asked_for.then(|| {
        Mutex::new(Pages {
            heap: heap_start(&maps),
            asked: HashMap::new(),
            others: OTHERS,
            searched: 0,
        })
    })
});

/// Sees to it that what an operation reads and writes lies in huge pages, as far as it can.
pub fn prepare(op: &Operation<'_>) {
    let largest = op.send.bytes().max(op.recv.bytes());
    let Some(pages) = PAGES.as_ref().filter(|_| largest >= SMALLEST) else {
        return;
    };
    let mut pages = pages.lock();
    let heap = pages.heap.map(|start| start..heap_end());
    for buffer in [&op.send, &op.recv] {
        let (start, bytes) = (buffer.data() as usize, buffer.bytes());
        if bytes >= OFTEN_MAPPED {
            advise(&inside(&(start..start + bytes)), libc::MADV_HUGEPAGE);
        }
        if bytes >= SMALLEST {
            for block in blocks(&(start..start + bytes), heap.as_ref()) {
                pages.ask(block);
            }
        }
    }
    if let Some(heap) = heap.filter(|_| op.reduction.is_some()) {
        pages.ask_for_another(&heap);
    }
}

impl Pages {
    fn ask(&mut self, block: usize) {
        let asked = self.asked.entry(block).or_default();
        if *asked < ATTEMPTS {
            let whole = block * BLOCK..(block + 1) * BLOCK;
            advise(&whole, libc::MADV_HUGEPAGE);
            // For what has pages already (Linux 6.1); an older one does it in the background.
            let done = advise(&whole, libc::MADV_COLLAPSE);
            *asked = if done { ATTEMPTS } else { *asked + 1 };
        }
    }

    /// MPI reduces in memory of its own, which lies somewhere in the heap, rather near its end.
    fn ask_for_another(&mut self, heap: &Range<usize>) {
        if self.others == 0 || self.searched == heap.end {
            return;
        }
        let unfinished = |block: &usize| self.asked.get(block).is_none_or(|n| *n < ATTEMPTS);
        match blocks(heap, Some(heap)).rev().find(unfinished) {
            Some(block) => {
                self.others -= 1;
                self.ask(block);
            }
            None => self.searched = heap.end,
        }
    }
}

/// The blocks to ask for: those inside the range, and in the heap also those at its ends.
fn blocks(range: &Range<usize>, heap: Option<&Range<usize>>) -> Range<usize> {
    let inner = inside(range);
    match heap {
        Some(heap) if heap.contains(&range.start) && range.end <= heap.end => {
            let first = (range.start / BLOCK).max(heap.start.div_ceil(BLOCK));
            first..range.end.div_ceil(BLOCK).min(heap.end / BLOCK)
        }
        _ => inner.start / BLOCK..inner.end / BLOCK,
    }
}

/// The whole blocks in a range.
fn inside(range: &Range<usize>) -> Range<usize> {
    range.start.next_multiple_of(BLOCK)..range.end / BLOCK * BLOCK
}

/// Whether it was taken.
fn advise(range: &Range<usize>, advice: libc::c_int) -> bool {
    if range.is_empty() {
        return true;
    }
    // SAFETY: neither advice changes what the memory holds, and memory that is not mapped is an
    // error without effect (madvise(2)). It is only advice: refused, everything works as before.
    unsafe { libc::madvise(range.start as *mut libc::c_void, range.len(), advice) == 0 }
}

/// Where the heap ends, by the kernel's own word. UCX, which MPICH uses, puts a function of its own
/// in the place of sbrk(3). That sets the end to what it was a moment before also where it is only
/// asked: another thread's malloc then loses what it has just got.
fn heap_end() -> usize {
    // SAFETY: an address below the heap changes nothing, and tells where it ends (brk(2)).
    unsafe { libc::syscall(libc::SYS_brk, 0) as usize }
}

/// From a text like that of /proc/self/maps (proc(5)).
fn heap_start(maps: &str) -> Option<usize> {
    let line = maps.lines().find(|line| line.ends_with("[heap]"))?;
    usize::from_str_radix(line.split_once('-')?.0, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_at_the_ends_only_in_the_heap() {
        let (heap, range) = (BLOCK / 2..BLOCK * 9 / 2, BLOCK * 3 / 2..BLOCK * 7 / 2);
        assert_eq!(blocks(&range, None), 2..3);
        assert_eq!(blocks(&range, Some(&heap)), 1..4);
        // The heap ends in the middle of block 4, and begins in that of block 0.
        assert_eq!(blocks(&(BLOCK..heap.end), Some(&heap)), 1..4);
        assert_eq!(blocks(&heap, Some(&heap)), 1..4);
        assert_eq!(blocks(&(BLOCK * 8..BLOCK * 10), Some(&heap)), 8..10);
    }

    #[test]
    fn small_arrays_have_no_block_of_their_own() {
        let range = BLOCK + 64..BLOCK + 64 + SMALLEST;
        assert!(blocks(&range, None).is_empty());
        assert!(inside(&range).is_empty());
        assert_eq!(blocks(&range, Some(&(0..BLOCK * 2))), 1..2);
    }

    #[test]
    fn the_end_of_the_heap_is_that_of_its_mapping() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let start = heap_start(&maps).unwrap();
        assert!(start < heap_end() && heap_end() - start < 1 << 40);
    }

    #[test]
    fn the_heap_is_found() {
        let maps = "55d0c000-55d0f000 r--p 00000000 08:01 5 /bin/cat\n\
                    56f10000-56f31000 rw-p 00000000 00:00 0                          [heap]\n";
        assert_eq!(heap_start(maps), Some(0x56f1_0000));
        assert_eq!(heap_start(""), None);
        let own = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(heap_start(&own).is_some());
    }

    #[test]
    fn contents_stay() {
        let mut memory: Vec<u8> = (0..3 * BLOCK).map(|i| i as u8).collect();
        let start = memory.as_mut_ptr() as usize;
        let whole = inside(&(start..start + memory.len()));
        advise(&whole, libc::MADV_HUGEPAGE);
        advise(&whole, libc::MADV_COLLAPSE);
        assert!(!advise(&(0..BLOCK), libc::MADV_COLLAPSE));
        assert!(memory.iter().enumerate().all(|(i, byte)| *byte == i as u8));
    }
}
