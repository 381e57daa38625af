//! Runs other programs. Their output is shown where a caller wants it, and always when they fail.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// Runs `command` with this process's input and output.
///
/// # Errors
///
/// When it cannot be started or fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {}", describe(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", describe(command));
    }
    Ok(())
}

/// Runs `command` and returns its standard output. Its standard error is part of the error when it fails, and dropped
/// otherwise.
///
/// # Errors
///
/// When it cannot be started, fails, or writes something other than UTF-8.
pub(crate) fn read(command: &mut Command) -> Result<String> {
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("starting {}", describe(command)))?;
    if !output.status.success() {
        let text = [output.stdout, output.stderr].concat();
        bail!(
            "{} failed: {}\n{}",
            describe(command),
            output.status,
            String::from_utf8_lossy(&text).trim_end()
        );
    }
    String::from_utf8(output.stdout).with_context(|| format!("reading the output of {}", describe(command)))
}

/// Runs `command` and passes each line of its standard output to `line` as it comes. Returns whether it succeeded.
///
/// # Errors
///
/// When it cannot be started or its output cannot be read.
pub(crate) fn follow(command: &mut Command, mut line: impl FnMut(&str)) -> Result<bool> {
    let mut child =
        command.stdout(Stdio::piped()).spawn().with_context(|| format!("starting {}", describe(command)))?;
    if let Some(stdout) = child.stdout.take() {
        let mut stdout = BufReader::new(stdout);
        let mut bytes = Vec::new();
        // Bytes, because a test that prints no UTF-8 must not end the run.
        while stdout.read_until(b'\n', &mut bytes)? > 0 {
            line(String::from_utf8_lossy(&bytes).trim_end_matches('\n'));
            bytes.clear();
        }
    }
    Ok(child.wait()?.success())
}

/// The command as it is typed in a shell.
pub(crate) fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words = words.map(|word| word.to_string_lossy()).collect::<Vec<_>>();
    format!("`{}`", words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn an_error_has_the_command_and_its_output() {
        let error = read(&mut shell("echo out; echo err >&2; exit 3")).unwrap_err().to_string();
        assert!(error.contains("`sh -c") && error.contains("3") && error.contains("out\nerr"), "{error}");
        assert_eq!(read(&mut shell("echo out; echo err >&2")).unwrap(), "out\n");
    }

    #[test]
    fn following_survives_bytes_that_are_no_text_and_reports_failure() {
        let mut lines = Vec::new();
        let good =
            follow(&mut shell("printf 'a\\n\\377\\nlast'; exit 1"), |line| lines.push(line.to_owned()));
        assert!(!good.unwrap());
        assert_eq!(lines, ["a", "\u{fffd}", "last"]);
    }
}
