//! Whether the socket plane serves in front of nftables.
//!
//! In: the configured mode, the probe's findings, and a function that opens the plane. Out: the open plane; or none, with the
//! reason in the log, and then nftables serves alone.

use crate::{causes::causes, config::ProxyMode, machine::probe::Probe};

/// Opens the plane if `mode` wants it and the machine has every needed feature. With [`ProxyMode::Auto`] a missing feature
/// or a failure is logged, and the result is `None`.
///
/// # Errors
///
/// With [`ProxyMode::Ebpf`], when a needed feature is missing, or `open` fails.
pub fn choose<T, E: Into<anyhow::Error>>(
    mode: ProxyMode,
    probe: impl FnOnce() -> Probe,
    open: impl FnOnce(&Probe) -> Result<T, E>,
) -> anyhow::Result<Option<T>> {
    if mode == ProxyMode::Nftables {
        return Ok(None);
    }
    let probe = probe();
    let only = mode == ProxyMode::Ebpf;
    let reasons = probe.reasons();
    if !reasons.is_empty() {
        if only {
            anyhow::bail!(
                "the mode is ebpf, and this machine lacks needed features:\n  {}",
                reasons.join("\n  ")
            );
        }
        for reason in reasons {
            tracing::warn!(kernel = probe.kernel, "{reason}");
        }
        tracing::warn!(kernel = probe.kernel, "the socket plane cannot run, nftables serves alone");
        return Ok(None);
    }
    probe.log();
    match open(&probe).map_err(Into::into) {
        Ok(plane) => Ok(Some(plane)),
        Err(error) if only => Err(anyhow::anyhow!(
            "the mode is ebpf, and the socket plane does not start: {}",
            causes(error.as_ref())
        )),
        Err(error) => {
            let text = causes(error.as_ref()).replace('\n', "\n    ");
            tracing::error!(
                kernel = probe.kernel,
                "the socket plane does not start, nftables serves alone:\n    {text}"
            );
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{self, Write},
        sync::{Arc, Mutex},
    };

    use super::*;

    /// The log lines of `work`.
    fn logged<T>(work: impl FnOnce() -> T) -> (T, String) {
        #[derive(Clone, Default)]
        struct Lines(Arc<Mutex<Vec<u8>>>);
        impl Write for Lines {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().write(bytes)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .without_time()
            .with_target(false)
            .with_ansi(false)
            .finish();
        let result = tracing::subscriber::with_default(subscriber, work);
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        (result, text)
    }

    const VERIFIER: &str =
        "0: R1=ctx() R10=fp0\n0: (b7) r0 = 7\nAt program exit the register R0 has a bad value";

    /// An error as `aya` has it: the cause is in the text, and is the source too.
    #[derive(Debug, thiserror::Error)]
    #[error("the BPF_PROG_LOAD syscall returned {cause}. Verifier output: {VERIFIER}")]
    struct Refused {
        #[source]
        cause: io::Error,
    }

    #[derive(Debug, thiserror::Error)]
    #[error("cannot load the program connect4")]
    struct NotLoaded(#[source] Refused);

    fn opens(_: &Probe) -> Result<&'static str, NotLoaded> {
        Ok("plane")
    }

    fn refused(_: &Probe) -> Result<&'static str, NotLoaded> {
        Err(NotLoaded(Refused { cause: io::Error::from_raw_os_error(libc::EINVAL) }))
    }

    fn not_asked<T, E>(_: &Probe) -> Result<T, E> {
        panic!("opened although a feature is missing")
    }

    #[test]
    fn with_everything_there_the_plane_is_opened_and_one_line_says_so() {
        for mode in [ProxyMode::Auto, ProxyMode::Ebpf] {
            let (chosen, log) = logged(|| choose(mode, || Probe::fixture(&[]), opens));
            assert_eq!(chosen.unwrap(), Some("plane"));
            assert_eq!(
                log,
                " INFO this kernel has every feature that the socket plane can use kernel=\"9.8.7\"\n"
            );
        }
    }

    #[test]
    fn nftables_asks_for_nothing() {
        let probe = || panic!("nftables needs no probe");
        let (chosen, log) = logged(|| choose(ProxyMode::Nftables, probe, not_asked::<(), NotLoaded>));
        assert_eq!((chosen.unwrap(), log.as_str()), (None, ""));
    }

    #[test]
    fn what_is_optional_is_warned_of_and_keeps_nothing_away() {
        for mode in [ProxyMode::Auto, ProxyMode::Ebpf] {
            let (chosen, log) = logged(|| choose(mode, || Probe::fixture(&[("set_retval", false)]), opens));
            assert_eq!(chosen.unwrap(), Some("plane"));
            assert_eq!(log, " WARN set_retval: no (since Linux 9.9). A test asks for it. kernel=\"9.8.7\"\n");
        }
    }

    #[test]
    fn what_is_missing_leaves_auto_to_nftables_and_ends_ebpf() {
        let probe = || Probe::fixture(&[("storage", true), ("set_retval", false), ("bpffs", true)]);
        let (chosen, log) = logged(|| choose(ProxyMode::Auto, probe, not_asked::<(), NotLoaded>));
        assert_eq!(chosen.unwrap(), None);
        insta::assert_snapshot!(log, @r#"
         WARN storage: no (since Linux 9.9). A test asks for it. kernel="9.8.7"
         WARN bpffs: no (since Linux 9.9). A test asks for it. kernel="9.8.7"
         WARN the socket plane cannot run, nftables serves alone kernel="9.8.7"
        "#);
        let error = choose(ProxyMode::Ebpf, probe, not_asked::<(), NotLoaded>).unwrap_err();
        insta::assert_snapshot!(format!("{error:#}"), @r"
        the mode is ebpf, and this machine lacks needed features:
          storage: no (since Linux 9.9). A test asks for it.
          bpffs: no (since Linux 9.9). A test asks for it.
        ");
    }

    #[test]
    fn a_program_the_verifier_refuses_leaves_auto_to_nftables_and_its_message_in_the_log() {
        let (chosen, log) = logged(|| choose(ProxyMode::Auto, || Probe::fixture(&[("x", false)]), refused));
        assert_eq!(chosen.unwrap(), None);
        insta::assert_snapshot!(log, @r#"
         WARN x: no (since Linux 9.9). A test asks for it. kernel="9.8.7"
        ERROR the socket plane does not start, nftables serves alone:
            cannot load the program connect4: the BPF_PROG_LOAD syscall returned Invalid argument (os error 22). Verifier output: 0: R1=ctx() R10=fp0
            0: (b7) r0 = 7
            At program exit the register R0 has a bad value kernel="9.8.7"
        "#);
    }

    #[test]
    fn a_program_the_verifier_refuses_ends_ebpf_with_its_message_told_once() {
        let error = choose(ProxyMode::Ebpf, || Probe::fixture(&[]), refused).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.ends_with(VERIFIER), "{text}");
        assert_eq!(text.matches("Invalid argument").count(), 1, "{text}");
    }
}
