//! The environment as MPI sees it when it starts.

/// Calls `start` while the environment lacks the variable `name`.
pub(super) fn without<T>(name: &str, start: impl FnOnce() -> T) -> T {
    let Some(value) = std::env::var_os(name) else {
        return start();
    };
    // SAFETY: Rust and Python read the environment under locks of their own; this runs while one
    // thread joins the world, as `MPI_Init` itself (which also sets variables) does.
    unsafe { std::env::remove_var(name) };
    let result = start();
    // SAFETY: as above.
    unsafe { std::env::set_var(name, value) };
    result
}

/// Calls `start` while the environment has the variable `name`, unless it has it anyway.
pub(super) fn with<T>(name: &str, value: &str, start: impl FnOnce() -> T) -> T {
    if std::env::var_os(name).is_some() {
        return start();
    }
    // SAFETY: as in [`without`].
    unsafe { std::env::set_var(name, value) };
    let result = start();
    // SAFETY: as in [`without`].
    unsafe { std::env::remove_var(name) };
    result
}

/// Whether a folder of `PATH` has one of these programs.
pub(super) fn has_program(names: &[&str]) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| names.iter().any(|name| folder.join(name).is_file()))
}

#[cfg(test)]
mod tests {
    use super::{has_program, with, without};

    #[test]
    fn a_variable_is_there_meanwhile() {
        let own = || std::env::var("MPI_CUDA_TEST_OF_ENVIRONMENT").ok();
        let seen = with("MPI_CUDA_TEST_OF_ENVIRONMENT", "1", own);
        assert_eq!((seen.as_deref(), own()), (Some("1"), None));
        let name = || std::env::var("CARGO_PKG_NAME").ok();
        assert_eq!(with("CARGO_PKG_NAME", "other", name), name());
        assert!(has_program(&["nothing", "sh"]) && !has_program(&["no such program"]));
    }

    #[test]
    fn a_variable_comes_back() {
        let own = || std::env::var("CARGO_PKG_NAME").ok();
        let before = own();
        assert_eq!(without("CARGO_PKG_NAME", own), None);
        assert_eq!(own(), before);
    }
}
