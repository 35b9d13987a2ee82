//! The image: heap, model slot, counter of cycles, and how a run ends.

use core::alloc::{GlobalAlloc, Layout};
use core::fmt::Write as _;
use core::sync::atomic::{AtomicUsize, Ordering};

use cortex_m_rt::entry;
use cortex_m_semihosting::hio;
use embedded_alloc::LlffHeap;
use firmware_infer::run::{SLOT, run};
use panic_semihosting as _;

/// Where the emulator puts the model slot, as external flash would be mapped.
const SLOT_AT: usize = 0x6000_0000;
/// The heap, above the slot in the same memory.
const HEAP_AT: usize = 0x6040_0000;
/// Its size in bytes. Reading a record takes most of it; see the peaks that are printed.
const HEAP: usize = 2_560 << 10;

/// The heap, and the most that was ever taken of it.
struct Counted {
    heap: LlffHeap,
    peak: AtomicUsize,
}

// SAFETY: everything is passed on to the heap; counting touches no memory of it.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is the heap's.
        let block = unsafe { self.heap.alloc(layout) };
        self.peak.fetch_max(self.heap.used(), Ordering::Relaxed);
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is the heap's.
        unsafe { self.heap.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted {
    heap: LlffHeap::empty(),
    peak: AtomicUsize::new(0),
};

#[entry]
fn main() -> ! {
    // SAFETY: called once, before anything is allocated; nothing else lies at these addresses.
    unsafe { ALLOCATOR.heap.init(HEAP_AT, HEAP) };
    firmware_board::end(report())
}

fn report() -> Result<(), ()> {
    let mut out = hio::hstdout()?;
    // SAFETY: memory that the emulator filled before the start and nobody writes to.
    let slot = unsafe { core::slice::from_raw_parts(SLOT_AT as *const u8, SLOT) };
    let (mut load_peak, mut resident) = (0, 0);
    let result = run(&mut out, slot, || {
        resident = ALLOCATOR.heap.used();
        load_peak = ALLOCATOR.peak.swap(resident, Ordering::Relaxed);
    });
    let run_peak = ALLOCATOR.peak.load(Ordering::Relaxed);
    writeln!(
        out,
        "device: heap {HEAP} bytes, {load_peak} at most while loading, {resident} loaded, {run_peak} at most while running"
    )
    .map_err(drop)?;
    if let Err(failure) = result {
        writeln!(out, "device: FAILED: {failure}").map_err(drop)?;
        return Err(());
    }
    Ok(())
}
