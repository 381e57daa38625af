//! The agent's wall clock, which can jump while the machine's stays as it is.
//!
//! In: a directory. Out: a library that the agent is started with, and a file with the seconds by which its clock is off.

use std::{
    ffi::OsString,
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::Path,
    process::Command,
};

use anyhow::Result;

use super::fixture::run;

/// Stands before libc's functions. Time that only goes on is left alone: no clock that jumps changes that.
const LIBRARY: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile long *offset;

__attribute__((constructor)) static void open_offset(void) {
    const char *path = getenv("WEIR_CHAOS_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *at = mmap(NULL, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
    if (at != MAP_FAILED) offset = at;
    close(file);
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    long result = syscall(SYS_clock_gettime, clock, time);
    if (result == 0 && offset && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) time->tv_sec += *offset;
    return (int)result;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone) {
    struct timespec now;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
    time->tv_sec = now.tv_sec;
    time->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at) {
    struct timespec now;
    if (clock_gettime(CLOCK_REALTIME, &now)) return (time_t)-1;
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"#;

/// The clock of the agents.
pub(crate) struct Clock {
    library: OsString,
    path: OsString,
    offset: File,
}

impl Clock {
    /// Builds the library, with the C compiler that Rust links with.
    pub(crate) fn build(directory: &Path) -> Result<Self> {
        let (source, library, path) =
            (directory.join("clock.c"), directory.join("clock.so"), directory.join("clock"));
        fs::write(&source, LIBRARY)?;
        run(Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&source))?;
        let offset = File::create(&path)?;
        let clock = Self { library: library.into(), path: path.into(), offset };
        clock.jump(0)?;
        Ok(clock)
    }

    /// Starts a program with it.
    pub(crate) fn preload(&self, command: &mut Command) {
        command.env("LD_PRELOAD", &self.library).env("WEIR_CHAOS_CLOCK", &self.path);
    }

    /// Puts the clock so many seconds before or after the machine's.
    pub(crate) fn jump(&self, seconds: i64) -> Result<()> {
        Ok(self.offset.write_all_at(&seconds.to_ne_bytes(), 0)?)
    }
}
