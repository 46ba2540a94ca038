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

#[cfg(test)]
mod tests {
    use super::without;

    #[test]
    fn a_variable_comes_back() {
        let own = || std::env::var("CARGO_PKG_NAME").ok();
        let before = own();
        assert_eq!(without("CARGO_PKG_NAME", own), None);
        assert_eq!(own(), before);
    }
}
