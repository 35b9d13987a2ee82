//! Tells the linker where the memory map is. Arguments are given here and not in `.cargo/config`
//! because `RUSTFLAGS` in the environment would silently replace those.

fn main() {
    let here = env!("CARGO_MANIFEST_DIR");
    println!("cargo:rustc-link-search={here}");
    println!("cargo:rustc-link-arg-bins=-Tlink.x");
    println!("cargo:rerun-if-changed=memory.x");
    println!("cargo:rerun-if-changed=build.rs");
}
