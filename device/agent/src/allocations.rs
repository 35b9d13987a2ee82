//! Counting of heap allocations, so that "allocates nothing" is a measurement.
//!
//! The program sets [`Counting`] as its global allocator. The count of the calling thread is always
//! kept (a register's increment beside each allocation); that of all threads together only after
//! [`count_all`], since threads would contend for it. In a program without it both stay 0.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

thread_local! {
    // No destructor, so it may be touched as long as the thread runs.
    static MINE: Cell<u64> = const { Cell::new(0) };
}
static ALL: AtomicU64 = AtomicU64::new(0);
static COUNTS_ALL: AtomicBool = AtomicBool::new(false);

/// The system's allocator, with a count of calls that take memory; growing counts as one.
#[derive(Debug, Default)]
pub struct Counting;

// SAFETY: every call goes to the system's allocator as it came; counting takes no memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(block, layout) }
    }
}

fn count() {
    MINE.set(MINE.get() + 1);
    if COUNTS_ALL.load(Ordering::Relaxed) {
        ALL.fetch_add(1, Ordering::Relaxed);
    }
}

/// Allocations of this thread since it began.
pub fn of_this_thread() -> u64 {
    MINE.get()
}

/// Allocations of all threads since [`count_all`].
pub fn of_all_threads() -> u64 {
    ALL.load(Ordering::Relaxed)
}

/// Whether the program has [`Counting`] as its allocator.
pub fn are_counted() -> bool {
    let before = of_this_thread();
    drop(std::hint::black_box(Box::new(0u8)));
    of_this_thread() > before
}

/// From now on, allocations of all threads are counted too.
pub fn count_all() {
    COUNTS_ALL.store(true, Ordering::Relaxed);
}
