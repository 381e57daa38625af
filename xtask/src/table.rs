//! Tables in kubectl's form: upper-case headers, columns three spaces apart, no rules, nothing cut.

use comfy_table::{ContentArrangement, Table, presets};

/// Rows below a header, with a newline at the end of each.
pub(crate) fn columns(header: &[&str], rows: &[Vec<String>]) -> String {
    const BETWEEN: u16 = 3;
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header).add_rows(rows);
    table.column_iter_mut().for_each(|column| {
        column.set_padding((0, BETWEEN));
    });
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_longest_cell_and_lines_end_with_text() {
        let rows =
            [["a control plane", "ebpf"], ["b", "nftables"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(
            columns(&["NODE", "PROXY-MODE"], &rows),
            "NODE              PROXY-MODE\na control plane   ebpf\nb                 nftables\n"
        );
    }
}
