//! An entry of `XLA_FLAGS` that the inner plugin does not know makes it kill the process without
//! an exception. We look first.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::Error;
use crate::search::contains;

/// Refuses flags whose name does not occur in the inner plugin's file.
pub fn check(plugin: &Path) -> Result<(), Error> {
    let Ok(flags) = std::env::var("XLA_FLAGS") else {
        return Ok(());
    };
    let names = names(&flags);
    if names.is_empty() {
        return Ok(());
    }
    match unknown(plugin, &names) {
        Ok(unknown) if unknown.is_empty() => Ok(()),
        Ok(unknown) => Err(Error::invalid(format!(
            "XLA_FLAGS has {}, which the inner plugin {} does not know (it would end the \
             process): remove it from XLA_FLAGS",
            unknown.join(", "),
            plugin.display()
        ))),
        Err(error) => Err(Error::internal(format!(
            "cannot read {}: {error}",
            plugin.display()
        ))),
    }
}

fn names(flags: &str) -> Vec<String> {
    flags
        .split_whitespace()
        .filter_map(|flag| flag.strip_prefix("--"))
        .map(|flag| flag.split('=').next().unwrap_or_default().to_owned())
        .filter(|name| !name.is_empty())
        .collect()
}

/// The names that do not stand, NUL-terminated, in the file.
fn unknown(file: &Path, names: &[String]) -> std::io::Result<Vec<String>> {
    let mut content = Vec::new();
    File::open(file)?.read_to_end(&mut content)?;
    let known = |name: &String| {
        let mut needle = name.clone().into_bytes();
        needle.push(0);
        contains(&content, &needle)
    };
    Ok(names.iter().filter(|name| !known(name)).cloned().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_read_like_xla_does() {
        assert_eq!(
            names("--xla_a=1  --xla_b --no=x=y"),
            ["xla_a", "xla_b", "no"]
        );
        assert!(names("/path/to/flags").is_empty());
    }
}
