//! A dirty bitmap as rust-vmm keeps one: a vector of atomic words, marked and taken with sequential consistency.
//!
//! One file for rustc, without crates; the functions are those of races.c.

use std::sync::atomic::{AtomicU64, Ordering};

pub struct Bitmap {
    words: Vec<AtomicU64>,
    npages: u64,
}

impl Bitmap {
    fn mark(&self, page: u64) -> i32 {
        if page >= self.npages {
            return -1;
        }
        self.words[(page >> 6) as usize].fetch_or(1 << (page & 63), Ordering::SeqCst);
        0
    }
}

#[no_mangle]
pub extern "C" fn rust_new(npages: u64) -> *mut Bitmap {
    let words = (0..(npages + 63) / 64).map(|_| AtomicU64::new(0)).collect();
    Box::into_raw(Box::new(Bitmap { words, npages }))
}

/// # Safety
/// The bitmap is one of `rust_new`, and ends here.
#[no_mangle]
pub unsafe extern "C" fn rust_free(bitmap: *mut Bitmap) {
    drop(Box::from_raw(bitmap));
}

/// # Safety
/// The bitmap is one of `rust_new`.
#[no_mangle]
pub unsafe extern "C" fn rust_mark(bitmap: *const Bitmap, page: u64) -> i32 {
    (*bitmap).mark(page)
}

/// # Safety
/// The bitmap is one of `rust_new`, and there are `n` pages.
#[no_mangle]
pub unsafe extern "C" fn rust_mark_pages(bitmap: *const Bitmap, pages: *const i64, n: usize) -> i32 {
    for page in std::slice::from_raw_parts(pages, n) {
        (*bitmap).mark(*page as u64);
    }
    0
}

/// # Safety
/// The bitmap is one of `rust_new`.
#[no_mangle]
pub unsafe extern "C" fn rust_mark_range(bitmap: *const Bitmap, first: u64, count: u64) -> i32 {
    for page in first..first + count {
        (*bitmap).mark(page);
    }
    0
}

/// # Safety
/// The bitmap is one of `rust_new`, and `out` has a word for each of its own.
#[no_mangle]
pub unsafe extern "C" fn rust_take(bitmap: *const Bitmap, out: *mut u64) -> u64 {
    for (i, word) in (*bitmap).words.iter().enumerate() {
        *out.add(i) = word.swap(0, Ordering::SeqCst);
    }
    0
}

/// # Safety
/// The bitmap is one of `rust_new`, and `out` has room for all of its pages.
#[no_mangle]
pub unsafe extern "C" fn rust_take_pages(bitmap: *const Bitmap, out: *mut i64, _room: usize) -> usize {
    let mut n = 0;
    for (i, word) in (*bitmap).words.iter().enumerate() {
        let mut pages = word.swap(0, Ordering::SeqCst);
        while pages != 0 {
            *out.add(n) = (i * 64) as i64 + i64::from(pages.trailing_zeros());
            n += 1;
            pages &= pages - 1;
        }
    }
    n
}

/// # Safety
/// The bitmap is one of `rust_new`.
#[no_mangle]
pub unsafe extern "C" fn rust_count(bitmap: *const Bitmap) -> u64 {
    (*bitmap).words.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
}

/// # Safety
/// The bitmap is one of `rust_new`, and `words` has a word for each of its own.
#[no_mangle]
pub unsafe extern "C" fn rust_fill(bitmap: *const Bitmap, words: *const u64) -> u64 {
    for (i, word) in (*bitmap).words.iter().enumerate() {
        word.store(*words.add(i), Ordering::Relaxed);
    }
    0
}
