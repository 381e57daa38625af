//! Values of flags as Go's flag package reads them, because kube-proxy's command lines are written for it.
//!
//! In: the text of a flag. Out: a boolean or an integer, or an error that quotes the text.

/// Reads a boolean as `strconv.ParseBool` does.
///
/// # Errors
///
/// When the text is none of its words.
pub(super) fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!("`{text}` is not true or false")),
    }
}

/// Reads an integer as `strconv.ParseInt` does with base 0: decimal, or with a prefix of its base, with underscores between digits.
///
/// # Errors
///
/// When the text is no such number, or does not fit into 32 bits.
pub(super) fn integer(text: &str) -> Result<i32, String> {
    let (sign, digits) = match text.as_bytes().first() {
        Some(b'-') => ("-", &text[1..]),
        Some(b'+') => ("", &text[1..]),
        _ => ("", text),
    };
    let lower = digits.to_ascii_lowercase();
    let (base, prefix) = match lower.as_bytes() {
        [b'0', b'x', ..] => (16, 2),
        [b'0', b'b', ..] => (2, 2),
        [b'0', b'o', ..] => (8, 2),
        [b'0', _, ..] => (8, 1),
        _ => (10, 0),
    };
    let digits = &lower[prefix..];
    // Go accepts an underscore between two digits, and after a prefix.
    let misplaced =
        digits.ends_with('_') || digits.contains("__") || (prefix == 0 && digits.starts_with('_'));
    let plain = digits.replace('_', "");
    if misplaced || plain.starts_with(['+', '-']) {
        return Err(format!("`{text}` is not a number"));
    }
    i32::from_str_radix(&format!("{sign}{plain}"), base)
        .map_err(|_| format!("`{text}` is not a number from {} to {}", i32::MIN, i32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn booleans_and_integers_are_read_as_go_reads_them() {
        for (text, value) in
            [("1", true), ("T", true), ("TRUE", true), ("0", false), ("f", false), ("False", false)]
        {
            assert_eq!(boolean(text), Ok(value));
        }
        for text in ["", "yes", "tRUE", "2"] {
            assert_eq!(boolean(text), Err(format!("`{text}` is not true or false")));
        }
        for (text, value) in [
            ("0", 0),
            ("-999", -999),
            ("+7", 7),
            ("0x10", 16),
            ("0X1f", 31),
            ("010", 8),
            ("0b11", 3),
            ("0o17", 15),
            ("0x_10", 16),
            ("1_000", 1000),
            ("-0x8000_0000", i32::MIN),
        ] {
            assert_eq!(integer(text), Ok(value), "{text}");
        }
        for text in
            ["", "-", "x", "09", "1.0", "_1", "1_", "0x", "0x1__0", "0x10_", "0x-1", "--1", "2147483648"]
        {
            assert!(integer(text).is_err(), "{text}");
        }
    }
}
