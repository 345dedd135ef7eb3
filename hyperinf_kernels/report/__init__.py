"""The parts of the HTML report; `hyperinf_kernels.report.render_html` puts them together."""
