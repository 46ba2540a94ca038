//! The library is never unloaded: threads of it and what it has registered may outlive `dlclose`.

fn main() {
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
