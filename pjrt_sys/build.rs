//! Generates the bindings from the headers of the installed wheels; nothing is vendored.
//!
//! `pjrt_c_api.h` comes from the wheel `xla-cpu-pjrt`, `xla/ffi/api/c_api.h` from `jaxlib`.

use std::env;
use std::path::{Path, PathBuf};

/// A header, where it lies in `site-packages`, and how a user points us elsewhere.
struct Header {
    variable: &'static str,
    in_site_packages: &'static str,
    wheel: &'static str,
}

const PJRT: Header = Header {
    variable: "MPI_CUDA_PJRT_HEADER",
    in_site_packages: "xla_plugins/xla_cpu_pjrt/include/pjrt_c_api.h",
    wheel: "xla-cpu-pjrt",
};
const FFI: Header = Header {
    variable: "MPI_CUDA_FFI_HEADER",
    in_site_packages: "jaxlib/include/xla/ffi/api/c_api.h",
    wheel: "jaxlib",
};

fn main() {
    let headers = [find(&PJRT), find(&FFI)];
    let mut builder = bindgen::Builder::default()
        .allowlist_item("PJRT_.*")
        .allowlist_item("XLA_FFI_.*")
        // Functions come from the tables at run time; we link nothing.
        .blocklist_function(".*")
        .prepend_enum_name(false)
        .derive_default(false)
        .generate_comments(false)
        .layout_tests(true);
    for header in headers {
        println!("cargo::rerun-if-changed={}", header.display());
        builder = builder.header(header.to_str().expect("header path is UTF-8"));
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    builder
        .generate()
        .expect("bindgen failed; is libclang installed (Debian: apt-get install libclang-dev)?")
        .write_to_file(out.join("bindings.rs"))
        .expect("write bindings");
}

fn find(header: &Header) -> PathBuf {
    println!("cargo::rerun-if-env-changed={}", header.variable);
    if let Some(path) = env::var_os(header.variable) {
        let path = PathBuf::from(path);
        assert!(
            path.is_file(),
            "{}={} is not a file",
            header.variable,
            path.display()
        );
        return path;
    }
    println!("cargo::rerun-if-env-changed=VIRTUAL_ENV");
    let package = env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let root = Path::new(&package).parent().expect("workspace root");
    let environments = env::var_os("VIRTUAL_ENV")
        .map(PathBuf::from)
        .into_iter()
        .chain([root.join(".venv")]);
    for environment in environments {
        let Ok(versions) = environment.join("lib").read_dir() else {
            continue;
        };
        for version in versions.flatten() {
            let path = version
                .path()
                .join("site-packages")
                .join(header.in_site_packages);
            if path.is_file() {
                return path;
            }
        }
    }
    panic!(
        "{} not found: run scripts/setup, or install the wheel `{}` into $VIRTUAL_ENV or .venv, \
         or set {} to the header's path",
        header.in_site_packages, header.wheel, header.variable
    );
}
